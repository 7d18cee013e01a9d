"""Models on disk: names, folders, conversion and fingerprints."""


class ModelError(Exception):
    """A model cannot be had or must not be served; the message says why and what to do."""
