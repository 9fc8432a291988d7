"""The model cards can be read by the Hub's own client and have the required sections."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard


CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*.md"))


# The commands that made and measured what a card is about.
COMMANDS = {
    "msd-toy-llava": ("python -m msd_hf.toy.build", "python -m msd_hf.toy.evaluate"),
    "msd-toy-llava-hard": ("python -m msd_hf.toy.hard.build", "python -m msd_hf.toy.hard.evaluate", "msd-hf bench"),
}


def test_there_are_cards_of_the_bundled_pairs():
    assert {card.stem for card in CARDS} == set(COMMANDS)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_card_has_the_hub_metadata_and_its_sections(path):
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert "speculative-decoding" in data["tags"]
    for section in ("## How it was made", "## Data", "## Results", "## Limits"):
        assert section in card.text, section
    for command in COMMANDS[path.stem]:
        assert command in card.text, command
