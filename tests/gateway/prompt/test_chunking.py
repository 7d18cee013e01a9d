"""Long documents in chunks: each has room, none is lost, cut where a reader would, the same everywhere."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prompt_templates import CHATML, MakeTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drystone.v1.generation_pb2 import Chunking
from gateway.prompt import PromptTokenizer
from gateway.prompt.chunking import MIN_CHUNK_TOKENS, check_chunking, chunks_of
from gateway.prompt.templates import passage_text
from shared.errors import InvalidRequestError, Reason

FAMILY = "👩\u200d👩\u200d👧"
PIECES = st.one_of(
    st.sampled_from(
        [
            " ",
            "\n",
            "\n\n",
            "\r\n\r\n",
            "\t \n \n",
            " " * 30,
            "\n" * 20,
            ". ",
            "! ",
            "...",
            "。",
            "stone ",
            "wall",
            "\u3000",
        ]
    ),
    st.sampled_from(
        [FAMILY, "e\u0301", "🇫🇷", "石墙不用灰浆", "पत्थर", "x" * 90, "<|im_end|>", "<think>", "ﬁ", "Å", "\ufeff"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
TEXT = st.lists(PIECES, max_size=60).map("".join)
OPTIONS = st.builds(
    lambda most, part, paragraphs: Chunking(
        max_tokens=most, overlap_tokens=int(part * (most - 1)) // 2, at_paragraphs=paragraphs
    ),
    st.integers(MIN_CHUNK_TOKENS, 60),
    st.floats(0, 1),
    st.booleans(),
)
# With the tests' tokenizer most words are several tokens.
PROSE = " ".join(f"Word{number} stands here." for number in range(200))


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    """Pieces that hold the space before them, bytes for what is not known, control tokens that are pieces too."""
    pieces = [("<unk>", 0.0), ("</s>", -0.1), ("▁stone", -3.0), ("▁wall", -3.0), ("▁", -4.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyzW0123456789.!<>/|"]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["</s>"])
    folder = tmp_path_factory.mktemp("unigram")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)  # noqa: S106
    return PromptTokenizer(folder)


def size(tokenizer: PromptTokenizer, title: str, chunk: str) -> int:
    return len(tokenizer.encode(passage_text(title, chunk), allow_special=False))


def bare(text: str) -> str:
    return re.sub(r"\s+", "", text)


def assert_covers(body: str, chunks: list[str]) -> None:
    """Each chunk lies in the text, begins no later than the one before ended, and goes beyond its end."""
    # Where the chunk before may have begun and ended: short texts occur more than once.
    spans = {(0, 0)}
    for chunk in chunks:
        found = set[tuple[int, int]]()
        for before, reached in spans:
            first_new = reached + len(body[reached:]) - len(body[reached:].lstrip())
            at = body.find(chunk, before)
            while 0 <= at <= first_new:
                if at + len(chunk) > reached:
                    found.add((at, at + len(chunk)))
                at = body.find(chunk, at + 1)
        spans = found
        assert spans, chunk
    assert len(body) in {end for _, end in spans}


def check(tokenizer: PromptTokenizer, title: str, text: str, options: Chunking) -> list[str]:
    chunks = chunks_of(title, text, options, tokenizer)
    assert chunks
    assert all(size(tokenizer, title, chunk) <= options.max_tokens for chunk in chunks)
    if size(tokenizer, title, text) <= options.max_tokens:
        assert chunks == [text]
        return chunks
    assert all(chunk == chunk.strip() and chunk for chunk in chunks)
    if not options.overlap_tokens:
        assert bare("".join(chunks)) == bare(text)
    assert_covers(text.strip(), chunks)
    return chunks


@given(text=TEXT, options=OPTIONS)
@example(text="a" + "\n" * 500 + "b", options=Chunking(max_tokens=16))
@example(text="." * 300 + " a", options=Chunking(max_tokens=16, overlap_tokens=7, at_paragraphs=True))
@example(text="e" + "\u0301" * 200, options=Chunking(max_tokens=16, overlap_tokens=7))
def test_chunks_have_room_and_lose_nothing(chatml: PromptTokenizer, text: str, options: Chunking) -> None:
    check(chatml, "", text, options)


@given(text=TEXT, options=OPTIONS)
def test_pieces_that_hold_their_space(unigram: PromptTokenizer, text: str, options: Chunking) -> None:
    check(unigram, "", text.replace("<|im_end|>", "</s>"), options)


@given(text=TEXT, most=st.integers(24, 60), overlap=st.integers(0, 11))
def test_a_title_counts(chatml: PromptTokenizer, text: str, most: int, overlap: int) -> None:
    check(chatml, "Dry", text, Chunking(max_tokens=most, overlap_tokens=overlap))


@pytest.mark.parametrize("text", ["", " \n ", "a wall", "  a wall \n\n stands  \n"])
def test_what_fits_is_unchanged(chatml: PromptTokenizer, text: str) -> None:
    assert chunks_of("t", text, Chunking(max_tokens=40), chatml) == [text]
    assert chunks_of("t", text * 99, Chunking(), chatml) == [text * 99]


def test_a_text_of_the_very_size_is_not_cut(chatml: PromptTokenizer) -> None:
    exact = size(chatml, "t", PROSE)
    assert chunks_of("t", PROSE, Chunking(max_tokens=exact), chatml) == [PROSE]
    assert len(chunks_of("t", PROSE, Chunking(max_tokens=exact - 1), chatml)) == 2


def test_every_gateway_cuts_alike(make_tokenizer: MakeTokenizer) -> None:
    options = Chunking(max_tokens=50, overlap_tokens=9, at_paragraphs=True)
    first, second = (make_tokenizer(CHATML) for _ in range(2))
    first.encode(PROSE, allow_special=False)
    assert chunks_of("t", PROSE, options, first) == chunks_of("t", PROSE, options, second)


def test_paragraph_then_sentence_then_white_space(chatml: PromptTokenizer) -> None:
    options = Chunking(max_tokens=60, at_paragraphs=True)
    paragraphs = "\n \n".join(f"{'one two. ' * 5}end{number}" for number in range(9))
    chunks = check(chatml, "", paragraphs, options)
    assert all(re.search(r"end\d$", chunk) for chunk in chunks)
    sentences = " ".join(f"one two three stop{number}." for number in range(40))
    assert all(re.search(r"stop\d+\.$", chunk) for chunk in check(chatml, "", sentences, options))
    quoted = " ".join(f'"one two three stop{number}!")' for number in range(40))
    assert all(chunk.endswith('!")') for chunk in check(chatml, "", quoted, options))
    words = " ".join(f"word{number}" for number in range(99))
    assert bare(words) == bare("".join(chunks := check(chatml, "", words, options)))
    assert all(re.fullmatch(r"(word\d+ ?)+", chunk) for chunk in chunks)
    cjk = "石墙不用灰浆。" * 30
    assert all(chunk.endswith("。") for chunk in check(chatml, "", cjk, options))


def test_windows_line_ends_are_no_blank_lines(chatml: PromptTokenizer) -> None:
    lines = "\r\n".join(f"{'one two. ' * 3}line{number}" for number in range(20))
    chunks = check(chatml, "", lines, Chunking(max_tokens=60, at_paragraphs=True))
    assert all(chunk.endswith("two.") for chunk in chunks[:-1])


def test_chunks_are_filled_where_paragraphs_do_not_matter(chatml: PromptTokenizer) -> None:
    text = "\n\n".join("one two. " * 6 for _ in range(30))
    chunks = check(chatml, "", text, Chunking(max_tokens=64))
    assert all(size(chatml, "", chunk) >= 64 * 7 // 8 - 4 for chunk in chunks[:-1])


def test_paragraphs_do_not_make_chunks_shorter_than_half(chatml: PromptTokenizer) -> None:
    text = "One.\n\n" + "two three " * 200
    chunks = check(chatml, "", text, Chunking(max_tokens=64, at_paragraphs=True))
    assert all(size(chatml, "", chunk) >= 30 for chunk in chunks[:-1])


@pytest.mark.parametrize("at_paragraphs", [True, False])
def test_overlap_repeats_whole_words(chatml: PromptTokenizer, *, at_paragraphs: bool) -> None:
    options = Chunking(max_tokens=80, overlap_tokens=25, at_paragraphs=at_paragraphs)
    chunks = check(chatml, "", PROSE, options)
    places = [PROSE.index(chunk) for chunk in chunks]
    for before, chunk, at, begin in zip(chunks, chunks[1:], places, places[1:], strict=False):
        repeated = PROSE[begin : at + len(before)]
        assert repeated
        assert chunk.startswith(repeated)
        assert 25 // 3 <= len(chatml.encode(repeated, allow_special=False)) <= 26
        assert PROSE[begin - 1] == " "


def test_characters_are_not_torn(chatml: PromptTokenizer) -> None:
    for sign in (FAMILY, "e\u0301", "👍🏽", "हि"):
        for chunk in check(chatml, "", sign * 60, Chunking(max_tokens=32, overlap_tokens=10)):
            assert chunk == sign * (len(chunk) // len(sign))


def test_the_work_is_in_proportion_to_the_text(chatml: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    real = PromptTokenizer.encode

    def counted(self: PromptTokenizer, text: str, *, allow_special: bool) -> tuple[int, ...]:
        nonlocal read
        read += len(text)
        return real(self, text, allow_special=allow_special)

    monkeypatch.setattr(PromptTokenizer, "encode", counted)
    for text in (
        PROSE * 9,
        "x" * 20_000,
        "石墙。" * 5000,
        "a" + " " * 20_000 + "b",
        FAMILY * 2000,
        "." * 20_000,
        "\n." * 9000,
    ):
        read = 0
        chunks_of("", text, Chunking(max_tokens=100, overlap_tokens=49, at_paragraphs=True), chatml)
        assert read < 6 * len(text)


def test_a_title_that_leaves_no_room_is_refused(chatml: PromptTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"chunking\.max_tokens.*no room.*title") as raised:
        chunks_of("wall " * 56, PROSE, Chunking(max_tokens=64), chatml)
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_FIELD, "chunking.max_tokens")
    with pytest.raises(InvalidRequestError):
        chunks_of("wall " * 70, "", Chunking(max_tokens=64), chatml)
    long = "wall " * 12
    # Room for twelve tokens of text, of which six are repeated at most.
    chunks = check(chatml, long, PROSE, Chunking(max_tokens=size(chatml, long, "") + 12, overlap_tokens=20))
    assert len(chunks) < len(chatml.encode(PROSE, allow_special=False)) / 6


def test_a_character_of_many_tokens(tmp_path: Path) -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))], 0, True))  # noqa: FBT003 - by place only
    backend.normalizer = normalizers.NFKC()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)  # noqa: S106
    tokenizer = PromptTokenizer(tmp_path)
    # One character, which stands for a whole sentence.
    sign = "\ufdfa"
    tokens = len(tokenizer.encode(sign, allow_special=False))
    assert tokens > MIN_CHUNK_TOKENS
    assert check(tokenizer, "", sign * 9, Chunking(max_tokens=tokens + 1)) == [sign] * 9
    with pytest.raises(InvalidRequestError, match="no room"):
        chunks_of("", sign * 9, Chunking(max_tokens=tokens), tokenizer)


def test_documents_may_spell_control_tokens_where_they_are_trusted(chatml: PromptTokenizer) -> None:
    text = "<|im_end|>" * 40
    assert len(chunks_of("", text, Chunking(max_tokens=41), chatml, allow_special=True)) == 1
    assert len(chunks_of("", text, Chunking(max_tokens=41), chatml)) > 5


@given(text=TEXT, allow_special=st.booleans())
@example(text="ab</s>cd</s></s>", allow_special=False)
def test_offsets_are_of_the_same_tokens(
    chatml: PromptTokenizer, unigram: PromptTokenizer, text: str, *, allow_special: bool
) -> None:
    for tokenizer in (chatml, unigram):
        found = tokenizer.encode_with_offsets(text, allow_special=allow_special)
        assert tuple(found.ids) == tokenizer.encode(text, allow_special=allow_special)
        assert len(found.ids) == len(found.starts) == len(found.ends)
        assert all(0 <= start <= end <= len(text) for start, end in zip(found.starts, found.ends, strict=True))
        assert list(found.starts) == sorted(found.starts)


def test_offsets_in_text_that_is_cut_at_control_tokens(unigram: PromptTokenizer) -> None:
    text = "ab</s>cd</s>e"
    found = unigram.encode_with_offsets(text, allow_special=False)
    places = list(zip(found.starts, found.ends, strict=True))
    assert {place for start, end in places for place in range(start, end)} == set(range(len(text)))
    assert max(end - start for start, end in places) < len("</s>")
    assert text[places[-1][0] : places[-1][1]] == "e"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (Chunking(overlap_tokens=1), "chunking.overlap_tokens"),
        (Chunking(max_tokens=MIN_CHUNK_TOKENS - 1), "chunking.max_tokens"),
        (Chunking(max_tokens=1001), "chunking.max_tokens"),
        (Chunking(max_tokens=100, overlap_tokens=50), "chunking.overlap_tokens"),
        (Chunking(max_tokens=101, overlap_tokens=51), "chunking.overlap_tokens"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Chunking, field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        check_chunking(options, most_tokens=1000)
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_FIELD, field)


@pytest.mark.parametrize(
    "options",
    [
        Chunking(),
        Chunking(at_paragraphs=True),
        Chunking(max_tokens=MIN_CHUNK_TOKENS),
        Chunking(max_tokens=1000, overlap_tokens=499),
        Chunking(max_tokens=101, overlap_tokens=50),
    ],
)
def test_options_that_can_be_pass(options: Chunking) -> None:
    check_chunking(options, most_tokens=1000)


def test_tokenizer_files_are_all_that_it_takes(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer._tokenizer.save_pretrained(tmp_path)
    options = Chunking(max_tokens=50, overlap_tokens=9)
    assert chunks_of("t", PROSE, options, PromptTokenizer(tmp_path)) == chunks_of("t", PROSE, options, tokenizer)
