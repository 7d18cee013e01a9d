"""The sending side: extents on their way to decode workers."""
