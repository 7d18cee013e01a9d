"""What gateway and workers share: layout and keys, the engine's model side, RPC plumbing, settings, errors."""
