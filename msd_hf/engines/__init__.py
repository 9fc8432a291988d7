"""The draft in other engines: one folder an engine."""
