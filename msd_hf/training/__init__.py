"""Training a draft for a target (paper section 3.3)."""

from .acceptance import acceptance_lengths
from .arguments import MSDTrainingArguments
from .curriculum import Curriculum, CurriculumSampler
from .data.conversations import Conversation, Conversations, load_conversations
from .data.encoding import ConversationEncoder
from .features.cache import FeatureCache, extract_features
from .new_draft import new_draft
from .recipes import RECIPES, Recipe
from .regeneration.regenerate import regenerate
from .trainer import MSDTrainer


__all__ = [
    "RECIPES",
    "Conversation",
    "ConversationEncoder",
    "Conversations",
    "Curriculum",
    "CurriculumSampler",
    "FeatureCache",
    "MSDTrainer",
    "MSDTrainingArguments",
    "Recipe",
    "acceptance_lengths",
    "extract_features",
    "load_conversations",
    "new_draft",
    "regenerate",
]
