"""Drystone's client: SDK and command line for block-attention serving."""
