"""Slots of the KV cache, and cache layers that keep accepted slots in place."""
