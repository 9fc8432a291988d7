"""Limits of what a user may give, for options, loaders and training arguments alike. Importing them needs no torch."""

LARGEST_SEED = 2**32 - 1  # of numpy, which `set_seed` of transformers seeds too
MOST_WORKERS = 256  # more processes that prepare samples take a machine's memory, not its cores
DTYPE_NAMES = "auto, float32, bfloat16, float16 or float64"

__all__ = ["DTYPE_NAMES", "LARGEST_SEED", "MOST_WORKERS"]
