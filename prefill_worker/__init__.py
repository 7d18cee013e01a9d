"""Prefill worker: encodes blocks once, keeps them, ships them."""
