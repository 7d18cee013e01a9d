"""Block KV as bytes: shape, key, birth, chunks. Free of torch, so that the gateway can use it."""
