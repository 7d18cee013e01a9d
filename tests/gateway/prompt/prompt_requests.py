"""Short ways to say a request, and to read a plan."""

from hypothesis import strategies as st

from drystone.v1 import generation_pb2 as pb
from drystone.v1 import prompt_pb2 as prompts
from drystone.v1.statistics_pb2 import BlockRole
from gateway.prompt import PlannedPrompt, PromptTokenizer

KEY = "0123456789abcdef" * 4
BLOCK, FULL = prompts.ATTENTION_BLOCK, prompts.ATTENTION_FULL
LEFT, RIGHT = prompts.TRUNCATION_SIDE_LEFT, prompts.TRUNCATION_SIDE_RIGHT
PREAMBLE, PASSAGE = BlockRole.BLOCK_ROLE_PREAMBLE, BlockRole.BLOCK_ROLE_PASSAGE
FULL_ROLE = BlockRole.BLOCK_ROLE_FULL
Document, BlockInput, Message = prompts.Document, prompts.BlockInput, prompts.ChatMessage

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
SIDES = st.sampled_from([LEFT, RIGHT])


def rag(*texts: str, question: str = "Why?", **fields: object) -> pb.GenerateRequest:
    documents = [Document(title=f"T{index}", text=text) for index, text in enumerate(texts)]
    return pb.GenerateRequest(rag=prompts.RagPrompt(documents=documents, question=question), **fields)


def blocks(*texts: str, **fields: object) -> pb.GenerateRequest:
    given = [BlockInput(text=text) for text in texts]
    return pb.GenerateRequest(blocks=prompts.BlocksPrompt(blocks=given), **fields)


def chat(*said: tuple[str, str], documents: tuple[Document, ...] = (), **fields: object) -> pb.GenerateRequest:
    messages = [Message(role=role, content=content) for role, content in said]
    return pb.GenerateRequest(chat=prompts.ChatPrompt(messages=messages, documents=documents), **fields)


def limited(tokens: int, side: int = prompts.TRUNCATION_SIDE_UNSPECIFIED) -> prompts.Truncation:
    return prompts.Truncation(side=side, max_prompt_tokens=tokens)


def all_ids(plan: PlannedPrompt) -> tuple[int, ...]:
    return sum((block.token_ids for block in plan.blocks), ()) + plan.question_ids


def text_of(tokenizer: PromptTokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
