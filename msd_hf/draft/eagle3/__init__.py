"""EAGLE-3 drafts: configuration, model, and the conventions of published checkpoints."""
