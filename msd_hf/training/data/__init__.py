"""Conversations to train on: reading, checking and encoding them."""
