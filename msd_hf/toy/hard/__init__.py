"""A harder world: pictures of 5 to 20 things with 576 visual tokens, albums of up to 16 pictures, texts of chance.

The answers have to look at one thing after the other, so that a draft accepts about as many tokens as on real models.
Importing this package and making data needs neither torch nor transformers.
"""

from pathlib import Path

from .dataset import KIND_GROUPS, KINDS, HardPrompt, HardSamples, make_evaluation_prompts, make_prompts, make_sample
from .picture import Picture, Thing, make_picture, render


# The bundled pair.
TARGET_DIR = Path(__file__).parent / "pair" / "target"
DRAFT_DIR = Path(__file__).parent / "pair" / "draft"

__all__ = [
    "DRAFT_DIR",
    "KINDS",
    "KIND_GROUPS",
    "TARGET_DIR",
    "HardPrompt",
    "HardSamples",
    "Picture",
    "Thing",
    "make_evaluation_prompts",
    "make_picture",
    "make_prompts",
    "make_sample",
    "render",
]
