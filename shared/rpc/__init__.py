"""gRPC plumbing that every server shares: construction, health, reflection, errors as statuses."""
