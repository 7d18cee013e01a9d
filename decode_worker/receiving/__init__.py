"""The receiving side: chunks of extents, verified into reserved memory."""
