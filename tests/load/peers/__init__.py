"""Other servers, installed into folders of their own, started on one core, and measured beside Drystone.

python -m tests.load.peers list
python -m tests.load.peers install vllm
"""
