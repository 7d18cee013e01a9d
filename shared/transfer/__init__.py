"""How an extent travels over ZeroMQ: what sender and receiver must agree on (transfer.proto draws it)."""
