"""Drystone on one machine: its processes, and the check of served answers against the reference."""
