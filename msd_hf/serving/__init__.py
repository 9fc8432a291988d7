"""An OpenAI-compatible server: transformers' own server application, with one target and its draft."""
