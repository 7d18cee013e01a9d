"""Request in, token ids of every block out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, groupby

from drystone.v1.generation_pb2 import Chunking, GenerateRequest
from drystone.v1.prompt_pb2 import Attention, Document, RagPrompt, TemplateOptions
from drystone.v1.statistics_pb2 import BlockRole
from gateway.prompt.chunking import chunks_of
from gateway.prompt.content import text_of
from gateway.prompt.limits import PromptLimits
from gateway.prompt.plan import PlannedBlock, PlannedPrompt
from gateway.prompt.prompt_rules import check_document
from gateway.prompt.segments import KnownBlocks, Segment, passage_segment, segments_of
from gateway.prompt.template_choice import TemplateDefaults, choose_template, wants_bos
from gateway.prompt.tokenizer import PromptTokenizer
from gateway.prompt.truncation import Room, cut_tokens, drop_passages, refuse_hopeless, room_for
from shared.errors import InvalidRequestError, Reason

BLOCK_ATTENTION_PREFIX = "[Block-Attention]"


class PromptPlanner:
    """Plans the prompts of one model. Holds no state of a request; safe for many threads.

    Args:
        tokenizer: The model's tokenizer.
        context_tokens: Longest prompt and answer together.
        limits: Upper bounds of this server.
        defaults: What the model's prompts look like when a request does not say.

    Raises:
        ValueError: The defaults do not suit the tokenizer.
    """

    def __init__(
        self, tokenizer: PromptTokenizer, *, context_tokens: int, limits: PromptLimits, defaults: TemplateDefaults
    ) -> None:
        defaults.check(tokenizer)
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._limits = limits
        self._defaults = defaults

    @property
    def template_name(self) -> str:
        """Template of a request that names none."""
        return self._defaults.resolved_name(self._tokenizer)

    def plan(self, request: GenerateRequest, known_blocks: KnownBlocks) -> PlannedPrompt:
        """Render, cut into blocks, tokenise, and make it fit.

        Args:
            request: A request that `validate` let pass.
            known_blocks: Token ids by block key (lower case), for every key of `block_keys_in`.

        Raises:
            DrystoneError: The template cannot render the prompt, or it does not fit.
        """
        room = room_for(request, self._context_tokens, self._limits.max_prompt_tokens)
        template = choose_template(request.template, self._defaults, self._tokenizer)
        segments = segments_of(request, template, known_blocks)
        refuse_hopeless((segment.text for segment in segments), self._context_tokens, room)
        if attention_of(request) == Attention.ATTENTION_FULL:
            return self._full_plan(request, template.name, segments, room)
        return self._block_plan(request, template.name, segments, room)

    def document_ids(
        self, document: Document, known_blocks: KnownBlocks, *, field: str, chunking: Chunking | None = None
    ) -> list[tuple[int, ...]]:
        """Token ids of one document's blocks, the same in every prompt that lays them.

        Args:
            document: As it came.
            known_blocks: Token ids by block key, for the key that it may be given as.
            field: Path that errors name.
            chunking: How a long text is cut. None: not at all.

        Raises:
            InvalidRequestError: The document breaks a rule, or is longer than the context.
        """
        check_document(field, document, self._limits)
        parts = [document]
        if chunking is not None and not document.HasField("block_key"):
            texts = chunks_of(
                document.title,
                text_of(document, field),
                chunking,
                self._tokenizer,
                allow_special=self._defaults.special_tokens_in_documents,
            )
            parts = [Document(title=document.title, text=text) for text in texts]
        blocks = [self._ids(passage_segment(field, part, known_blocks)) for part in parts]
        longest = max(map(len, blocks))
        if longest > self._context_tokens:
            raise InvalidRequestError(
                Reason.PROMPT_TOO_LONG,
                field,
                "is longer than the model's context, in tokens; have it cut into chunks",
                limit=self._context_tokens,
                value=longest,
            )
        return blocks

    def preamble_ids(self, template: TemplateOptions) -> list[tuple[int, ...]]:
        """Token ids of the block that `rag` prompts without instructions of their own begin with; none or one.

        Raises:
            DrystoneError: The template cannot render it.
        """
        asked = RagPrompt(documents=[Document(text=".")], question=".")
        plan = self.plan(GenerateRequest(rag=asked, template=template), {})
        return [block.token_ids for block in plan.blocks if block.role == BlockRole.BLOCK_ROLE_PREAMBLE]

    def _full_plan(
        self, request: GenerateRequest, template_name: str, segments: Sequence[Segment], room: Room
    ) -> PlannedPrompt:
        together = request.WhichOneof("prompt") == "chat"
        ids = self._ids_together(segments) if together else _joined(ids for _, ids in self._ids_alone(segments))
        lead = self._lead(request, template_name, ids)
        # A conversation that is to go on lives in its tail: the next turn then runs only what is new.
        return _full(lead + ids, room, store=request.store_full_block, as_tail=together and request.keep_tail)

    def _block_plan(
        self, request: GenerateRequest, template_name: str, segments: Sequence[Segment], room: Room
    ) -> PlannedPrompt:
        *local, (_, question_ids) = self._ids_alone(segments)
        blocks = [_planned(segment, ids) for segment, ids in local]
        lead = self._lead(request, template_name, blocks[0].token_ids if blocks else question_ids)
        kept, dropped = drop_passages(blocks, len(lead) + len(question_ids), room)
        own_block = request.WhichOneof("prompt") != "blocks"
        kept, question_ids = _led(kept, question_ids, lead, own_block=own_block)
        return PlannedPrompt(
            blocks=tuple(kept),
            question_ids=question_ids,
            attention=Attention.ATTENTION_BLOCK,
            truncated_tokens=sum(len(block.token_ids) for block in dropped),
            dropped_documents=tuple(block.document_index for block in dropped if block.document_index is not None),
        )

    def _lead(self, request: GenerateRequest, template_name: str, first_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens before the first block's own: BOS, then the prefix that BLOCK prompts were trained with."""
        by_itself = template_name == "plain" and request.WhichOneof("prompt") != "blocks"
        bos = self._tokenizer.bos_token_id
        lead: tuple[int, ...] = ()
        if wants_bos(request.template, self._defaults, self._tokenizer, by_itself=by_itself) and bos is not None:
            lead = () if first_ids[:1] == (bos,) else (bos,)
        if attention_of(request) == Attention.ATTENTION_BLOCK and self._wants_prefix(request.template):
            # Its ids stand by themselves, as in training: they do not merge with the text that follows.
            lead += self._tokenizer.encode(BLOCK_ATTENTION_PREFIX, allow_special=False)
        return lead

    def _wants_prefix(self, options: TemplateOptions) -> bool:
        given = options.HasField("block_attention_prefix")
        return options.block_attention_prefix if given else self._defaults.block_attention_prefix

    def _ids(self, segment: Segment) -> tuple[int, ...]:
        if segment.known_ids is not None:
            ids = segment.known_ids
        else:
            ids = self._tokenizer.encode(segment.text, allow_special=self._may_spell_control(segment))
        if not ids and segment.role != BlockRole.BLOCK_ROLE_PREAMBLE:
            question = segment.role == BlockRole.BLOCK_ROLE_QUESTION
            reason = Reason.EMPTY_PROMPT if question else Reason.EMPTY_DOCUMENT
            raise InvalidRequestError(reason, segment.field, "has no token")
        return ids

    def _ids_alone(self, segments: Sequence[Segment]) -> list[tuple[Segment, tuple[int, ...]]]:
        """Every segment tokenised alone. A preamble without tokens is left out."""
        pairs = ((segment, self._ids(segment)) for segment in segments)
        return [(segment, ids) for segment, ids in pairs if ids]

    def _ids_together(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        """Ids of the whole text at once; only block keys, which have no text here, stand by themselves."""
        ids: tuple[int, ...] = ()
        for known, run in groupby(segments, key=lambda segment: segment.known_ids is not None):
            if known:
                ids += _joined(self._ids(segment) for segment in run)
            else:
                parts = [(segment.text, self._may_spell_control(segment)) for segment in run]
                ids += self._tokenizer.encode_together(parts)
        if not ids:
            raise InvalidRequestError(Reason.EMPTY_PROMPT, segments[-1].field, "has no token")
        return ids

    def _may_spell_control(self, segment: Segment) -> bool:
        return not segment.from_document or self._defaults.special_tokens_in_documents


def attention_of(request: GenerateRequest) -> int:
    """Attention that a request gets: BLOCK unless it asks for FULL or is a conversation without documents."""
    bare_chat = request.WhichOneof("prompt") == "chat" and not request.chat.documents
    if bare_chat or request.attention == Attention.ATTENTION_FULL:
        return Attention.ATTENTION_FULL
    return Attention.ATTENTION_BLOCK


def _joined(parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(parts))


def _planned(segment: Segment, ids: tuple[int, ...]) -> PlannedBlock:
    text = segment.text if segment.known_ids is None else None
    return PlannedBlock(segment.role, ids, segment.document_index, store=True, text=text)


def _full(ids: tuple[int, ...], room: Room, *, store: bool, as_tail: bool) -> PlannedPrompt:
    """One block with all but the last token, which is the question block; or no block and a question that is all.

    A single token needs no block.
    """
    kept = cut_tokens(ids, room)
    document = PlannedBlock(BlockRole.BLOCK_ROLE_FULL, () if as_tail else kept[:-1], None, store=store, text=None)
    return PlannedPrompt(
        blocks=(document,) if document.token_ids else (),
        question_ids=kept[len(document.token_ids) :],
        attention=Attention.ATTENTION_FULL,
        truncated_tokens=len(ids) - len(kept),
        dropped_documents=(),
    )


def _led(
    blocks: list[PlannedBlock], question_ids: tuple[int, ...], lead: tuple[int, ...], *, own_block: bool
) -> tuple[list[PlannedBlock], tuple[int, ...]]:
    """Blocks and question with the lead in front.

    A passage never takes the lead in, so that its key is the same wherever it lies: with `own_block` the lead
    becomes a preamble of its own where there is none.
    """
    if not lead:
        return blocks, question_ids
    if blocks and (blocks[0].role == BlockRole.BLOCK_ROLE_PREAMBLE or not own_block):
        return [replace(blocks[0], token_ids=lead + blocks[0].token_ids), *blocks[1:]], question_ids
    if own_block:
        preamble = PlannedBlock(BlockRole.BLOCK_ROLE_PREAMBLE, lead, None, store=True, text="")
        return [preamble, *blocks], question_ids
    return blocks, lead + question_ids
