"""Chat templates as families of models have them, and the types of the fixtures that use them."""

from collections.abc import Callable

from gateway.prompt import PromptPlanner, PromptTokenizer

MakeTokenizer = Callable[..., PromptTokenizer]
MakePlanner = Callable[..., PromptPlanner]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% if level is defined %}{{ level + 1 }}{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ message['role'] }}\n{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}[{{ message['role'] }}]"
    "{{ message['content'] }}{% endif %}{% endfor %}[assistant]"
)
# The system turn goes into the last user turn, behind the conversation so far.
SYSTEM_LAST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}[{{ message['role'] }}]{% if loop.last %}{{ system }}{% endif %}"
    "{{ message['content'] }}{% endfor %}[assistant]"
)
REPEATS = (
    "{% for message in messages %}{{ message['content'] }}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
