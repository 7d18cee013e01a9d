"""Decode worker: holds block KV, runs question blocks, generates."""
