"""Drystone's client: SDK and command line for block-attention serving.

import drystone

with drystone.Client("127.0.0.1:7700") as client:
    answer = client.generate(
        "What holds a dry-stone wall together?",
        documents=[drystone.Document(title="Walls", text="A dry-stone wall holds without mortar: ...")],
    )
    print(answer.text, answer.usage)
"""

from drystone._async_client import AsyncClient, AsyncStream
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
    ProcessStatus,
    Routing,
    Sample,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)

__all__ = [
    "DEFAULT_ADDRESS",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Block",
    "BlockRole",
    "BlockSource",
    "BlockStats",
    "CancelledError",
    "Client",
    "Completed",
    "ConnectError",
    "DeadlineExceededError",
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
]
