"""The hook into transformers, and the refusals."""
