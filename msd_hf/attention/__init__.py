"""Attention masks of candidate trees, and kernels for few queries over long buffers."""
