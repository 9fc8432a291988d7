"""Training a draft for a target (paper section 3.3)."""

from .acceptance import acceptance_lengths
from .arguments import MSDTrainingArguments
from .conversations import Conversation, Conversations, load_conversations
from .curriculum import Curriculum, CurriculumSampler
from .encoding import ConversationEncoder
from .feature_cache import FeatureCache, extract_features
from .recipes import RECIPES, Recipe
from .regenerate import regenerate
from .trainer import MSDTrainer, new_draft


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
