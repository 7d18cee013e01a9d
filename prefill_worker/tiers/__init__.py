"""Where encoded blocks are kept: memory, local disk, an object store; each behind one interface."""
