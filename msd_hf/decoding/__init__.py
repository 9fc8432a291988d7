"""One call of `generate` with a draft."""
