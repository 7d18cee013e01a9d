"""From a request to the blocks that the model reads.

validate (`validation`) → choose a template (`templates`, `chat_template`) → cut into segments
(`segments`) → tokenise each alone (`tokenizer`) → fit into the context (`truncation`) → `PlannedPrompt`.
"""

from gateway.prompt.chunking import check_chunking
from gateway.prompt.content import block_keys_in
from gateway.prompt.limits import PromptLimits
from gateway.prompt.plan import PlannedBlock, PlannedPrompt
from gateway.prompt.planner import PromptPlanner
from gateway.prompt.sampling import filled_sampling
from gateway.prompt.template_choice import TemplateDefaults
from gateway.prompt.tokenizer import PromptTokenizer
from gateway.prompt.validation import validate

__all__ = [
    "PlannedBlock",
    "PlannedPrompt",
    "PromptLimits",
    "PromptPlanner",
    "PromptTokenizer",
    "TemplateDefaults",
    "block_keys_in",
    "check_chunking",
    "filled_sampling",
    "validate",
]
