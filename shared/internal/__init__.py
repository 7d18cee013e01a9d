"""Stubs of drystone.internal.v1."""
