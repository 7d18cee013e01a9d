"""Drystone's client: SDK and command line for block-attention serving.

import drystone

with drystone.Client("127.0.0.1:7700") as client:
    answer = client.generate(
        "What holds a dry-stone wall together?",
        documents=[drystone.Document(title="Walls", text="A dry-stone wall holds without mortar: ...")],
    )
    print(answer.text, answer.usage)
"""

from drystone._async_blocks import AsyncBlocks
from drystone._async_client import AsyncClient, AsyncStream
from drystone._async_warm_stream import AsyncWarmStream
from drystone._block_info import BlockInfo, BlockLocation, BlockSelector, DeletedBlocks
from drystone._blocks import Blocks
from drystone._client import Client, Stream
from drystone._config import DEFAULT_ADDRESS, Timeouts
from drystone._events import Completed, Event, SampleFinished, Started, TextDelta
from drystone._exceptions import (
    CancelledError,
    ConnectError,
    DeadlineExceededError,
    DrystoneError,
    IncompatibleError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    NotSupportedError,
    OverloadedError,
    UnavailableError,
)
from drystone._prompts import Block, Document, GenerateOptions, Message, Template, Truncation
from drystone._results import (
    Answer,
    BlockRole,
    BlockSource,
    BlockStats,
    FinishReason,
    ModelInfo,
    Routing,
    Sample,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from drystone._status import PairStatus, ProcessStatus
from drystone._warm_stream import WarmStream
from drystone._warming import Chunking, WarmedDocument, WarmOptions, WarmProgress, WarmResult

__all__ = [
    "DEFAULT_ADDRESS",
    "Answer",
    "AsyncBlocks",
    "AsyncClient",
    "AsyncStream",
    "AsyncWarmStream",
    "Block",
    "BlockInfo",
    "BlockLocation",
    "BlockRole",
    "BlockSelector",
    "BlockSource",
    "BlockStats",
    "Blocks",
    "CancelledError",
    "Chunking",
    "Client",
    "Completed",
    "ConnectError",
    "DeadlineExceededError",
    "DeletedBlocks",
    "Document",
    "DrystoneError",
    "Event",
    "FinishReason",
    "GenerateOptions",
    "IncompatibleError",
    "InternalError",
    "InvalidRequestError",
    "Message",
    "ModelInfo",
    "NotFoundError",
    "NotSupportedError",
    "OverloadedError",
    "PairStatus",
    "ProcessStatus",
    "Routing",
    "Sample",
    "SampleFinished",
    "Started",
    "Stream",
    "Template",
    "TextDelta",
    "Timeouts",
    "Timings",
    "TokenLogprob",
    "TopLogprob",
    "Truncation",
    "UnavailableError",
    "Usage",
    "WarmOptions",
    "WarmProgress",
    "WarmResult",
    "WarmStream",
    "WarmedDocument",
]
