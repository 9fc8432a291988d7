"""A target's features on disk."""
