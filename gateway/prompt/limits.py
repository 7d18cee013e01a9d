"""How much one request may ask for."""

from dataclasses import dataclass

_KIB = 1024
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """Upper bounds on the parts of a request; lengths in bytes are of UTF-8.

    Args:
        max_documents: Documents of a `rag` or `chat` prompt.
        max_document_bytes: Length of one document's or block's text.
        max_title_bytes: Length of one document's title.
        max_blocks: Blocks of a `blocks` prompt, the last one included.
        max_messages: Turns of a conversation.
        max_message_bytes: Length of one turn's text.
        max_role_bytes: Length of one turn's role.
        max_question_bytes: Length of a question.
        max_instructions_bytes: Length of the instructions.
        max_prompt_tokens: Tokens of a prompt, beside the model's context. None: the context alone counts.
        max_n: Samples of one request.
        max_logprobs: Alternatives per token.
        max_top_k: Largest `top_k`.
        max_stop_strings: Stop strings.
        max_stop_bytes: Length of one stop string.
        max_stop_token_ids: Stop token ids.
        max_logit_bias: Entries of `logit_bias`.
        max_constraint_bytes: Length of a JSON Schema or regular expression, or of a choice's options together.
        max_grammar_bytes: Length of a grammar.
        max_options: Options of a choice.
        max_request_id: Characters of the caller's request id.
    """

    max_documents: int = 1024
    max_document_bytes: int = _MIB
    max_title_bytes: int = 16 * _KIB
    max_blocks: int = 1025
    max_messages: int = 1024
    max_message_bytes: int = _MIB
    max_role_bytes: int = 64
    max_question_bytes: int = _MIB
    max_instructions_bytes: int = _MIB
    max_prompt_tokens: int | None = None
    max_n: int = 16
    max_logprobs: int = 20
    max_top_k: int = 2**31 - 1
    max_stop_strings: int = 64
    max_stop_bytes: int = 1024
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024
    max_constraint_bytes: int = 64 * _KIB
    max_grammar_bytes: int = 16 * _KIB
    max_options: int = 1024
    max_request_id: int = 128
