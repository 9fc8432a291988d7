"""A small multimodal world: procedural pictures, questions about them, and a tiny model pair trained on both.

Importing this package and making data needs neither torch nor transformers.
"""

from pathlib import Path

from .dataset import Prompt, iterate_samples, make_prompts, make_sample, make_samples, write_dataset
from .text_questions import TEXT_KINDS
from .turns import has_facts
from .visual_questions import VISUAL_KINDS
from .world import SPLITS, Scene, make_scene, render


TARGET_DIR = Path(__file__).parent / "pair" / "target"
DRAFT_DIR = Path(__file__).parent / "pair" / "draft"
DEMO_IMAGE = Path(__file__).parent / "demo.png"

__all__ = [
    "DEMO_IMAGE",
    "DRAFT_DIR",
    "SPLITS",
    "TARGET_DIR",
    "TEXT_KINDS",
    "VISUAL_KINDS",
    "Prompt",
    "Scene",
    "has_facts",
    "iterate_samples",
    "make_prompts",
    "make_sample",
    "make_samples",
    "make_scene",
    "render",
    "write_dataset",
]
