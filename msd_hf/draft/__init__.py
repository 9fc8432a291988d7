"""The draft model: configuration, module, checkpoints."""
