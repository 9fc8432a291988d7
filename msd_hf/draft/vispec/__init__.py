"""ViSpec drafts: configuration, model, and the adaptor that makes few rows of an image's many."""
