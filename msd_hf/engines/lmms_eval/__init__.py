"""Models for lmms-eval that decode with a draft: its own model classes, with the draft in each `generate`."""
