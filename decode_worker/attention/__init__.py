"""Attention backends of a decode step."""
