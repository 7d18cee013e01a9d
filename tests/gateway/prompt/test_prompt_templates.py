"""Templates: joined blocks are the ordinary rendering, and every form is what models were trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_templates import DROPS_SYSTEM, REPEATS, SYSTEM_LAST, MakeTokenizer

from drystone.v1.prompt_pb2 import TemplateOptions
from gateway.prompt import PromptTokenizer, TemplateDefaults
from gateway.prompt.chat_template import ChatTemplate
from gateway.prompt.template_choice import choose_template, wants_bos
from gateway.prompt.templates import CARD, INSTRUCTIONS, PLAIN, QUESTION, TULU, Frame, passage_text
from shared.errors import DrystoneError, InvalidRequestError, Reason

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PASSAGES = st.lists(st.builds(passage_text, TEXT, TEXT), min_size=1, max_size=4)
ASK = (
    "Please write a high-quality answer for the given question using only the provided search documents "
    "(some of which might be irrelevant).\nQuestion: Why?"
)


def joined(frame: Frame, *passages: str) -> str:
    return "".join((frame.preamble, *passages, frame.question))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_passage_form():
    assert passage_text("Wall", " Stone on stone.\n\n") == "- Title: Wall\nStone on stone.\n"
    assert passage_text("", "\nStone on stone. ") == "Stone on stone.\n"


def test_tulu_form():
    frame = TULU.rag(None, "Why?")
    assert frame == Frame(f"<|user|>\n{INSTRUCTIONS}\n\n", f"\n\n{ASK}\n<|assistant|>\n")


def test_card_form():
    frame = CARD.rag(None, "Why?")
    asked = ASK.replace(" (some of which might be irrelevant)", "")
    assert frame == Frame(f"\n{INSTRUCTIONS}\n\n", f"\n\n{asked}\n\n\n")


def test_plain_form_and_own_instructions():
    assert PLAIN.rag("Be brief.\n", "Why?") == Frame("Be brief.\n\n", f"\n\n{ASK}\nAnswer:")
    assert PLAIN.rag("", "{Why}").preamble == ""
    assert "{Why}" in PLAIN.rag("", "{Why}").question


def test_tulu_conversation():
    turns = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", "{c}")]
    said = "<|user|>\na\n<|assistant|>\nb<|end_of_text|>\n<|user|>\n{c}\n<|assistant|>\n"
    assert TULU.chat(turns, documents=False) == Frame("", f"<|system|>\nBe brief.\n{said}")
    assert TULU.chat(turns, documents=True) == Frame("<|system|>\nBe brief.\n\n", f"\n{said}")
    assert TULU.chat(turns[1:], documents=True).preamble == f"<|system|>\n{INSTRUCTIONS}\n\n"


@pytest.mark.parametrize("template", [CARD, PLAIN])
@pytest.mark.parametrize("documents", [True, False])
def test_forms_without_turns_refuse_conversations(template: object, documents: bool):  # noqa: FBT001
    with pytest.raises(DrystoneError, match="no form for conversations"):
        template.chat([turn("user", "a")], documents=documents)


def test_tulu_refuses_an_unknown_role():
    with pytest.raises(DrystoneError, match="no role 'tool'; it knows system, user, assistant"):
        TULU.chat([turn("tool", "a")], documents=False)


@given(instructions=st.none() | TEXT, passages=PASSAGES, question=TEXT)
def test_rag_blocks_joined_are_the_ordinary_rendering(
    chatml: PromptTokenizer, instructions: str | None, passages: list[str], question: str
):
    frame = ChatTemplate(chatml, {}).rag(instructions, question)
    said = INSTRUCTIONS if instructions is None else instructions.rstrip()
    system = (f"{said}\n\n" if said else "") + "".join(passages)
    turns = [turn("system", system), turn("user", QUESTION.format(question=question))]
    assert joined(frame, *passages) == chatml.render_chat(turns)


@given(system=st.none() | TEXT, passages=PASSAGES, said=st.lists(TEXT, min_size=1, max_size=4))
def test_chat_blocks_joined_are_the_ordinary_rendering(
    chatml: PromptTokenizer, system: str | None, passages: list[str], said: list[str]
):
    turns = [turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(said)]
    given = turns if system is None else [turn("system", system), *turns]
    frame = ChatTemplate(chatml, {}).chat(given, documents=True)
    lead = (INSTRUCTIONS if system is None else system.rstrip()) or ""
    content = (f"{lead}\n\n" if lead else "") + "".join(passages)
    assert joined(frame, *passages) == chatml.render_chat([turn("system", content), *turns])


def test_trimming_template_keeps_the_last_line_end_as_training_data_does(llama3: PromptTokenizer):
    passages = [passage_text("a", "b"), passage_text("c", "d")]
    frame = ChatTemplate(llama3, {}).rag(None, "Why?")
    ordinary = llama3.render_chat([turn("system", f"{INSTRUCTIONS}\n\n{''.join(passages)}"), turn("user", ASK)])
    seam = "<|eot_id|><|start_header_id|>user"
    assert joined(frame, *passages) == ordinary.replace(seam, f"\n{seam}")
    assert frame.preamble.startswith("<|begin_of_text|>")


@given(passages=PASSAGES, question=TEXT)
def test_refused_system_role_puts_everything_in_the_user_turn(
    no_system: PromptTokenizer, passages: list[str], question: str
):
    frame = ChatTemplate(no_system, {}).rag(None, question)
    asked = QUESTION.format(question=question)
    content = f"{INSTRUCTIONS}\n\n{''.join(passages)}\n\n{asked}"
    assert joined(frame, *passages) == no_system.render_chat([turn("user", content)])


def test_dropped_system_role_puts_everything_in_the_user_turn(make_tokenizer: MakeTokenizer):
    frame = ChatTemplate(make_tokenizer(DROPS_SYSTEM), {}).rag("Be brief.", "Why?")
    assert frame == Frame("[user]Be brief.\n\n", f"\n\n{ASK}[assistant]")


def test_system_behind_the_conversation_is_folded_in_front(make_tokenizer: MakeTokenizer):
    template = ChatTemplate(make_tokenizer(SYSTEM_LAST), {})
    turns = [turn("system", "Be brief."), turn("user", "first"), turn("assistant", "b"), turn("user", "c")]
    frame = template.chat(turns, documents=True)
    assert frame == Frame("[user]Be brief.\n\n", "\n\nfirst[assistant]b[user]c[assistant]")


def test_folding_before_an_assistant_turn_makes_a_user_turn(make_tokenizer: MakeTokenizer):
    template = ChatTemplate(make_tokenizer(DROPS_SYSTEM), {})
    frame = template.chat([turn("system", "s"), turn("assistant", "a"), turn("user", "b")], documents=True)
    assert frame == Frame("[user]s\n\n", "[assistant]a[user]b[assistant]")


def test_repeating_template_is_refused(make_tokenizer: MakeTokenizer):
    with pytest.raises(DrystoneError, match="leaves passages out or repeats them") as raised:
        ChatTemplate(make_tokenizer(REPEATS), {}).rag(None, "Why?")
    assert raised.value.reason == Reason.INVALID_TEMPLATE


def test_thinking_switch_and_keywords_reach_the_template(chatml: PromptTokenizer):
    options = TemplateOptions(enable_thinking=False)
    options.chat_template_kwargs.update({"level": 2})
    frame = choose_template(options, TemplateDefaults(), chatml).rag(None, "Why?")
    assert frame.question.endswith("<think>\n\n</think>\n\n3")
    defaults = TemplateDefaults(chat_template_kwargs={"enable_thinking": False, "level": 1})
    options = TemplateOptions(enable_thinking=True)
    assert choose_template(options, defaults, chatml).rag(None, "Why?").question.endswith("assistant\n2")


def test_struct_values_become_plain(chatml: PromptTokenizer):
    options = TemplateOptions()
    options.chat_template_kwargs.update({"a": [1, 2.5, None, True], "b": {"c": "d", "e": 3}})
    assert choose_template(options, TemplateDefaults(), chatml).kwargs == {
        "a": [1, 2.5, None, True],
        "b": {"c": "d", "e": 3},
    }
    assert isinstance(choose_template(options, TemplateDefaults(), chatml).kwargs["b"]["e"], int)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "add_generation_prompt", "documents"])
def test_reserved_keyword_is_refused(chatml: PromptTokenizer, name: str):
    options = TemplateOptions()
    options.chat_template_kwargs.update({name: "x"})
    with pytest.raises(InvalidRequestError) as raised:
        choose_template(options, TemplateDefaults(), chatml)
    assert raised.value.field == f"template.chat_template_kwargs.{name}"


def test_bad_keyword_is_the_templates_error(chatml: PromptTokenizer):
    options = TemplateOptions()
    options.chat_template_kwargs.update({"level": "high"})
    with pytest.raises(DrystoneError) as raised:
        choose_template(options, TemplateDefaults(), chatml).rag(None, "Why?")
    assert raised.value.reason == Reason.INVALID_TEMPLATE


def test_unknown_template_lists_the_known(chatml: PromptTokenizer):
    with pytest.raises(InvalidRequestError, match="chat, tulu, card, plain") as raised:
        choose_template(TemplateOptions(name="alpaca"), TemplateDefaults(), chatml)
    assert (raised.value.reason, raised.value.field) == (Reason.INVALID_TEMPLATE, "template.name")


def test_automatic_choice(chatml: PromptTokenizer, base: PromptTokenizer):
    assert choose_template(TemplateOptions(), TemplateDefaults(), chatml).name == "chat"
    assert choose_template(TemplateOptions(), TemplateDefaults(), base).name == "plain"
    assert choose_template(TemplateOptions(name="card"), TemplateDefaults(), base).name == "card"
    with pytest.raises(InvalidRequestError, match="no chat template"):
        choose_template(TemplateOptions(name="chat"), TemplateDefaults(), base)


@pytest.mark.parametrize(
    ("defaults", "problem"),
    [
        (TemplateDefaults(name="alpaca"), "unknown"),
        (TemplateDefaults(name="chat"), "needs a tokenizer with a chat template"),
        (TemplateDefaults(chat_template_kwargs={"tokenize": True}), "tokenize"),
    ],
)
def test_bad_defaults_are_refused(base: PromptTokenizer, defaults: TemplateDefaults, problem: str):
    with pytest.raises(ValueError, match=problem):
        defaults.check(base)


def test_bos_needs_a_token(chatml: PromptTokenizer):
    with pytest.raises(ValueError, match="BOS"):
        TemplateDefaults(bos="always").check(chatml)
    with pytest.raises(InvalidRequestError, match="no BOS token"):
        wants_bos(TemplateOptions(add_bos=True), TemplateDefaults(), chatml, by_itself=False)


@pytest.mark.parametrize(
    ("mode", "asked", "by_itself", "expected"),
    [
        ("auto", None, True, True),
        ("auto", None, False, False),
        ("always", None, False, True),
        ("never", None, True, False),
        ("never", True, False, True),
        ("always", False, True, False),
    ],
)
def test_bos_setting(base: PromptTokenizer, mode: str, asked: bool | None, by_itself: bool, expected: bool):  # noqa: FBT001
    options = TemplateOptions(add_bos=asked)
    assert wants_bos(options, TemplateDefaults(bos=mode), base, by_itself=by_itself) is expected
