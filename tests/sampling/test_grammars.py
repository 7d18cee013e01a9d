"""Structured output: every answer has the shape, ends where it may, and no constraint harms the process."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, models

from decode_worker.sampling import Choice, Grammars, Sampler, SampleState
from drystone.v1.sampling_pb2 import StructuredOutput
from shared.errors import DrystoneError, Reason
from tests.sampling.conftest import END_IDS, WIDTH, state

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["salt", "sea"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
EBNF = 'root ::= pair ("," pair)*\npair ::= [a-z] "=" [0-9]'
LARK = 'start: pair ("," pair)*\npair: /[a-z]/ "=" /[0-9]/'


def choice(*options: str) -> StructuredOutput:
    return StructuredOutput(choice=StructuredOutput.Choice(options=options))


def schema(value: object) -> StructuredOutput:
    return StructuredOutput(json_schema=json.dumps(value))


def answer(sampler: Sampler, tokenizer: Tokenizer, sample: SampleState, noise: int = 0, most: int = 400) -> str:
    """What a model of random logits says, to its end."""
    generator = torch.Generator().manual_seed(noise)
    while not sample.complete:
        assert len(sample.generated) < most, "it goes on for ever"
        (outcome,) = sampler.choose(torch.randn((1, WIDTH), generator=generator) * 2, [sample])
        assert isinstance(outcome, Choice), outcome
        if outcome.token_id in END_IDS:
            break
        sample.accept(outcome.token_id)
    return str(tokenizer.decode(sample.generated, skip_special_tokens=False))


def allowed(sample: SampleState) -> set[int]:
    assert sample.position_in_grammar is not None
    bits = np.unpackbits(sample.position_in_grammar.allowed(), bitorder="little")
    return set(np.nonzero(bits)[0].tolist())


@pytest.mark.parametrize("noise", range(12))
def test_json_is_of_its_schema(sampler: Sampler, grammars: Grammars, tokenizer: Tokenizer, noise: int) -> None:
    said = json.loads(answer(sampler, tokenizer, state(grammar=grammars.compile(schema(PERSON))), noise))
    assert list(said) == ["name", "age", "kind"]
    assert len(said["name"]) <= 6
    assert 0 <= said["age"] <= 150
    assert said["kind"] in {"salt", "sea"}


@pytest.mark.parametrize("values", [{}, {"temperature": 0.0}, {"temperature": 3.0, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (StructuredOutput(regex=r"(19|20)\d\d-(0[1-9]|1[0-2])"), r"(19|20)\d\d-(0[1-9]|1[0-2])"),
        (choice("yes", "no", 'a "quoted"\n\tthing', "ü😀"), 'yes|no|a "quoted"\n\tthing|ü😀'),
        (StructuredOutput(grammar=EBNF), r"[a-z]=[0-9](,[a-z]=[0-9])*"),
        (StructuredOutput(grammar=LARK), r"[a-z]=[0-9](,[a-z]=[0-9])*"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_answers_have_the_shape_asked_for(
    sampler: Sampler,
    grammars: Grammars,
    tokenizer: Tokenizer,
    constraint: StructuredOutput,
    pattern: str,
    values: dict[str, float],
) -> None:
    for noise in range(4):
        sample = state(grammar=grammars.compile(constraint), **values)
        assert re.fullmatch(pattern, answer(sampler, tokenizer, sample, noise))


def test_an_end_is_allowed_exactly_where_the_answer_may_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    sample = state(grammar=grammars.compile(StructuredOutput(regex="a{2,3}")))
    a, aa = tokenizer.token_to_id("a"), tokenizer.token_to_id("aa")
    longer = {aa} if aa is not None else set[int]()
    assert allowed(sample) == {a} | longer
    sample.accept(a)
    assert allowed(sample) == {a} | longer
    assert not sample.complete
    sample.accept(a)
    assert allowed(sample) == {a} | END_IDS
    assert not sample.complete
    sample.accept(a)
    assert sample.complete
    assert allowed(sample) == END_IDS


def test_a_complete_answer_ends_whatever_is_ignored(sampler: Sampler, grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.compile(StructuredOutput(regex="[ab]{3}|[ab]{5}"))
    for noise in range(8):
        ignoring = state(grammar=grammar, ignore_eos=True, stops=())
        assert len(answer(sampler, tokenizer, ignoring, noise)) == 5
        longest = state(grammar=grammar, min_new_tokens=50)
        assert len(answer(sampler, tokenizer, longest, noise)) == 5


def test_columns_beyond_the_tokenizer_are_never_allowed(sampler: Sampler, grammars: Grammars) -> None:
    logits = torch.zeros((1, WIDTH))
    logits[:, 400:] = 50.0
    (outcome,) = sampler.choose(logits, [state(grammar=grammars.compile(StructuredOutput(regex=".*")))])
    assert isinstance(outcome, Choice)
    assert outcome.token_id < 400


def test_a_tokenizer_with_more_tokens_than_the_model(tokenizer: Tokenizer) -> None:
    narrow = Grammars(tokenizer, 350, frozenset({2, 399}))
    sampler = Sampler(tokenizer, 350)
    (outcome,) = sampler.choose(torch.zeros((1, 350)), [state(grammar=narrow.compile(choice("yes")))])
    assert isinstance(outcome, Choice)
    assert outcome.token_id < 350


def test_a_model_without_an_end_token_cannot_be_constrained(tokenizer: Tokenizer) -> None:
    with pytest.raises(DrystoneError, match="no token that ends") as caught:
        Grammars(tokenizer, WIDTH, frozenset({10**6})).compile(choice("yes"))
    assert caught.value.reason == Reason.NOT_SUPPORTED


def test_a_token_that_the_grammar_does_not_allow_is_refused(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for asked_first in (True, False):
        for wrong in (tokenizer.token_to_id("z"), 2, WIDTH + 50, 2**31):
            sample = state(grammar=grammars.compile(StructuredOutput(regex="ab")))
            if asked_first:
                allowed(sample)
            with pytest.raises(DrystoneError) as caught:
                sample.accept(wrong)
            assert caught.value.reason == Reason.INTERNAL
            assert sample.generated == []
            # Nothing was taken: the right ones still may come.
            sample.accept(tokenizer.token_to_id("a"))
            sample.accept(tokenizer.token_to_id("b"))
            assert sample.complete
            with pytest.raises(DrystoneError):
                sample.accept(tokenizer.token_to_id("b"))


def test_a_shape_that_stop_tokens_make_impossible_fails_its_row_alone(
    sampler: Sampler, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    blocked = state(
        grammar=grammars.compile(StructuredOutput(regex="z")),
        stops={tokenizer.token_to_id("z"), 2},
        min_new_tokens=5,
    )
    failed, fine = sampler.choose(torch.zeros((2, WIDTH)), [blocked, state()])
    assert isinstance(failed, DrystoneError)
    assert failed.reason == Reason.INVALID_STRUCTURED_OUTPUT
    assert isinstance(fine, Choice)


@pytest.mark.parametrize(
    "constraint",
    [
        # What must be remembered doubles with each "a".
        StructuredOutput(regex="(.*a.{24}b|.*c.{24}d|[^q]*).*q"),
        StructuredOutput(regex="((a{1000}){1000}){1000}"),
        schema({"properties": {f"p{n}": {"type": "string"} for n in range(2000)}, "type": "object"}),
    ],
    ids=["doubling", "counting", "choosing"],
)
def test_a_shape_that_becomes_too_complex_says_so(
    sampler: Sampler, grammars: Grammars, tokenizer: Tokenizer, constraint: StructuredOutput
) -> None:
    with pytest.raises(DrystoneError) as caught:
        _driven(sampler, state(grammar=grammars.compile(constraint), stops=(), ignore_eos=True), tokenizer)
    assert caught.value.reason == Reason.INVALID_STRUCTURED_OUTPUT


def _driven(sampler: Sampler, sample: SampleState, tokenizer: Tokenizer) -> None:
    a = tokenizer.token_to_id("a")
    for step in range(2000):
        logits = torch.randn((1, WIDTH), generator=torch.Generator().manual_seed(step))
        logits[0, a] += 8 * (step % 3)
        (outcome,) = sampler.choose(logits, [sample])
        if isinstance(outcome, DrystoneError):
            raise outcome
        sample.accept(outcome.token_id)


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (StructuredOutput(), "no constraint"),
        (StructuredOutput(json_schema="{"), "not JSON"),
        (StructuredOutput(json_schema="[" * 50_000), "not JSON"),
        (StructuredOutput(json_schema="[]"), "must be a JSON object"),
        (schema(None), "must be a JSON object"),
        (schema(False), "must be a JSON object"),  # noqa: FBT003 # the schema itself
        (schema({"type": "strange"}), "strange"),
        (schema({"not": {}}), "Unimplemented"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"$ref": "http://127.0.0.1:9/x"}), "does not fetch"),
        (schema({"$ref": "file:///etc/hostname"}), "does not fetch"),
        (schema({"type": "integer", "multipleOf": 1_000_003}), "multipleOf"),
        (schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 1009}]}), "multipleOf"),
        (schema({"multipleOf": 10**400 + 1}), "multipleOf"),
        (StructuredOutput(regex="("), "unclosed"),
        (StructuredOutput(regex="(" * 16_000), "structured_output.regex"),
        (StructuredOutput(regex=r"\bword\b"), "lookaround"),
        (StructuredOutput(regex="a" * 300_000), "too long"),
        (choice(), "at least one"),
        (choice("a", ""), "empty"),
        (StructuredOutput(grammar=""), "rule"),
        (StructuredOutput(grammar="root ::= " + "(" * 4000), "structured_output.grammar"),
        (StructuredOutput(grammar="start: " + "(" * 16_000), "nested"),
        (StructuredOutput(grammar="start: " + "(" * 17_000), "too long"),
        (StructuredOutput(grammar="start: nothing"), "nothing"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_used_says_so(grammars: Grammars, constraint: StructuredOutput, says: str) -> None:
    with pytest.raises(DrystoneError, match=re.escape(says)) as caught:
        grammars.compile(constraint)
    assert caught.value.reason == Reason.INVALID_STRUCTURED_OUTPUT
    assert caught.value.field is not None
    assert caught.value.field.startswith("structured_output")
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "constraint",
    [
        # Chains that overflow a stack of the usual size.
        schema(
            {
                "$defs": {
                    **{f"a{n}": {"properties": {"x": {"$ref": f"#/$defs/a{n + 1}"}}} for n in range(1500)},
                    "a1500": {"type": "object"},
                },
                "$ref": "#/$defs/a0",
            }
        ),
        StructuredOutput(
            grammar="start: r0\n" + "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(800)) + '\nr800: "a"'
        ),
        schema({"items": json.loads('{"items":' * 60 + "{}" + "}" * 60)}),
    ],
    ids=["references", "rules", "nesting"],
)
def test_deep_constraints_end_well_or_with_a_reason(grammars: Grammars, constraint: StructuredOutput) -> None:
    with _reason_at_most():
        allowed(state(grammar=grammars.compile(constraint)))


_keywords = st.sampled_from(
    [
        "type",
        "properties",
        "items",
        "enum",
        "const",
        "anyOf",
        "allOf",
        "oneOf",
        "$ref",
        "$defs",
        "pattern",
        "required",
        "minLength",
        "maxItems",
        "minimum",
        "multipleOf",
        "additionalProperties",
        "format",
        "prefixItems",
    ]
)
_schemas = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["object", "array", "string", "number", "integer", "#", "#/$defs/a", "date-time", "a*"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keywords | st.text(max_size=3), inner, max_size=5),
    max_leaves=25,
)
_regexes = st.text(alphabet="ab(|)*+?{}[]^$.\\d,10-p:=!<&~ü\n", max_size=40) | st.text(max_size=30)
_grammars = st.text(alphabet='startROOT: |"ab()*+?{}[]/\\\n_%@<>,0=.~&', max_size=80) | st.lists(
    st.sampled_from(
        [
            "start:",
            "root ::=",
            "a",
            "B",
            '"x"',
            "/[0-9]+/",
            "|",
            "\n",
            "(",
            ")",
            "*",
            "{3,9}",
            "%json {}",
            "%regex {}",
            "<|im_end|>",
            "<[3]>",
            "%ignore",
            "[^a]",
            "a:",
            "B:",
            "~",
            "&",
            "[capture]",
            "%%",
        ]
    ),
    max_size=25,
).map(" ".join)
_constraints = st.one_of(
    _schemas.map(schema),
    st.text(max_size=40).map(lambda text: StructuredOutput(json_schema=text)),
    _regexes.map(lambda text: StructuredOutput(regex=text)),
    _grammars.map(lambda text: StructuredOutput(grammar=text)),
    st.lists(st.text(max_size=12), max_size=5).map(lambda options: choice(*options)),
)


@settings(max_examples=400)
@given(constraint=_constraints, noise=st.integers(0, 1000))
def test_any_constraint_at_all_ends_in_tokens_or_a_reason(
    sampler: Sampler, grammars: Grammars, constraint: StructuredOutput, noise: int
) -> None:
    with _reason_at_most():
        sample = state(grammar=grammars.compile(constraint))
        for step in range(12):
            if sample.complete:
                return
            generator = torch.Generator().manual_seed(noise + step)
            (outcome,) = sampler.choose(torch.randn((1, WIDTH), generator=generator), [sample])
            if isinstance(outcome, DrystoneError):
                raise outcome
            sample.accept(outcome.token_id)
            if outcome.token_id in END_IDS:
                return


@contextlib.contextmanager
def _reason_at_most() -> Iterator[None]:
    """Lets a refusal pass, of the one kind that is the caller's fault."""
    try:
        yield
    except DrystoneError as error:
        if error.reason != Reason.INVALID_STRUCTURED_OUTPUT:
            raise


@settings(max_examples=60)
@given(options=st.lists(st.text(min_size=1, max_size=10), min_size=1, max_size=6))
def test_each_option_of_a_choice_can_be_said_and_nothing_else(
    sampler: Sampler, grammars: Grammars, tokenizer: Tokenizer, options: list[str]
) -> None:
    grammar = grammars.compile(choice(*options))
    for option in options:
        sample = state(grammar=grammar)
        for token_id in _plain(tokenizer, option):
            sample.accept(token_id)
        assert allowed(sample) >= END_IDS
    assert answer(sampler, tokenizer, state(grammar=grammar)) in options


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Its bytes, a token each: the way in which special tokens cannot be meant."""
    letters = Tokenizer(models.BPE(tokenizer.get_vocab(with_added_tokens=False), []))
    letters.pre_tokenizer = tokenizer.pre_tokenizer
    return list(letters.encode(text, add_special_tokens=False).ids)
