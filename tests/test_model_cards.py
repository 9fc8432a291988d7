"""The model cards can be read by the Hub's own client and have the required sections."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard


CARDS = sorted((Path(__file__).parents[1] / "model_cards").glob("*.md"))


def test_there_is_a_card_of_the_bundled_pair():
    assert "msd-toy-llava" in {card.stem for card in CARDS}


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
    assert "python -m msd_hf.toy.build" in card.text and "python -m msd_hf.toy.evaluate" in card.text
