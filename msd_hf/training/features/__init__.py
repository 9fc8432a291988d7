"""Training features of a target, cached on disk."""
