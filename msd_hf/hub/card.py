"""Model cards of drafts, made from what lies in a draft's folder: its configuration and how it was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import MSDError, describe_error
from ..terminal import one_line
from ..writing.destination import read_config
from ..writing.redaction import redact, redact_text
from ..writing.saving import replace_text
from .finding import LIBRARY
from .measured import measured_section, redact_results, with_section
from .names import is_hub_id
from .usage import TEXT_TASK, VISION_TASK, usage_lines


CARD_NAME = "README.md"
PROVENANCE_NAME = "training_provenance.json"
# A card with this sentence is ours to replace.
MARK = "msd_hf wrote this card: remove this line if you edit it, and it is never replaced."
# `Trainer` of transformers writes this into a card, and asks that a user who edits the card removes it.
_MARK_OF_TRAINER = "generated automatically according to the information the Trainer had access to"
_KINDS = {  # by model_type: the papers
    "msd_draft": ("MSD", "2505.14260"),
    "eagle3_draft": ("EAGLE-3", "2503.01840"),
    "vispec_draft": ("ViSpec", "2509.15235"),
}
_RELATION = "adapter"  # of the Hub's four relations the one for weights that are loaded beside those of the base model
_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def is_generated(text: str) -> bool:
    """Whether a card was written by this package, or by `Trainer`, and not edited since."""
    return MARK in text or _MARK_OF_TRAINER in text


def make_card(
    folder: str | Path,
    name: str | None = None,
    *,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] | None = None,
) -> ModelCard:
    """
    Makes the card of a draft. Licence, languages, tags and figures of a card that is already there are kept, unless
    they are given.

    Args:
        folder: the draft's folder.
        name (*optional*): what a reader of the card loads the draft by: its id on the Hub. Default: the last part of
            the folder's name.
        license, language, tags (*optional*): of the metadata.
        results (*optional*): measured figures, see [`~msd_hf.hub.measured`].

    Raises:
        MSDError: when there is no draft in the folder, or its card cannot be read.
    """
    folder = Path(folder)
    config = redact(read_draft_config(folder))
    before = _metadata(load_card(folder))
    kept_tags = before.get("tags") or []
    kept_tags = [kept_tags] if isinstance(kept_tags, str) else [tag for tag in kept_tags if isinstance(tag, str)]
    model_type = config["model_type"]
    kind, arxiv = _KINDS[model_type]
    kind_tag = kind.replace("-", "").lower()
    all_tags = dict.fromkeys(["speculative-decoding", kind_tag, LIBRARY, *kept_tags, *tags])
    name = redact_text(one_line(name or folder.resolve().name))
    target = config.get("target_name_or_path")
    task = TEXT_TASK if _is_text_only(config) else VISION_TASK
    license = license or before.get("license")
    results = redact_results(before.get("eval_results") or []) if results is None else list(results)
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=task,
        base_model=target if is_hub_id(target) else None,
        base_model_relation=_RELATION if is_hub_id(target) else None,
        license=license,
        language=language or before.get("language"),
        tags=list(all_tags),
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    provenance = _read_provenance(folder)
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        mark=MARK,
        title=_text(name.split("/")[-1]),
        base_link=_base_link(target),
        paper=f"{kind}, arXiv {arxiv}",
        arxiv=arxiv,
        model_type=model_type,
        parts=_parts(config),
        usage=usage_lines(name, target, task),
        facts=_facts(config),
        training=_training(provenance),
        command=str(provenance.get("command", "")).replace("```", ""),
        measured=measured_section(results, _taus(provenance)),
        license_sentence=_license_sentence(license, target),
    )


def write_card(folder: str | Path, name: str | None = None, overwrite: bool = False, **fields: Any) -> Path:
    """
    Writes the card of a draft into its folder; `fields` are those of [`make_card`].

    Returns:
        The path of the card.

    Raises:
        MSDError: when there is no draft in the folder, or a card that somebody has written or edited, and not
            `overwrite`.
    """
    read_draft_config(folder)  # first: a page of another project is no card
    path = Path(folder) / CARD_NAME
    if not overwrite and path.exists() and not is_generated(read_text(path)):
        raise MSDError(f"{str(path)!r} is a card that you have written or edited: add --overwrite to replace it.")
    card = make_card(folder, name, **fields)
    try:
        replace_text(path, f"{str(card).rstrip()}\n")
    except OSError as error:
        raise MSDError(f"{str(path)!r} cannot be written: {error.strerror}.") from error
    return path


def update_results(folder: str | Path, results: Sequence[EvalResult]) -> Path:
    """
    Writes measured figures into the card of a draft: its metadata, and the section "Measured". All other text stays. A
    draft without a card gets one.

    Raises:
        MSDError: when there is no draft in the folder, or its card cannot be read or written.
    """
    card = load_card(folder)
    if card is None or is_generated(card.content):
        return write_card(folder, results=results)
    path = Path(folder) / CARD_NAME
    data: Any = card.data
    data.model_name = getattr(data, "model_name", None) or Path(folder).resolve().name
    data.eval_results = list(results)
    section = measured_section(results, _taus(_read_provenance(Path(folder))))
    card.text = with_section(card.text, section)
    replace_text(path, str(card))
    return path


def check_card(folder: str | Path) -> None:
    """
    Checks that figures can be written into the card of a draft, before they are measured.

    Raises:
        MSDError: when there is no draft in the folder, its card cannot be read, or the folder cannot be written.
    """
    read_draft_config(folder)
    load_card(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MSDError(f"The card in {str(folder)!r} cannot be written: the folder is read-only for this user.")


def copy_card(source: Path, folder: str | Path, changed: str | None = None) -> None:
    """
    Copies a card into the folder of a draft that was made from another one.

    Args:
        source: the card of the other draft.
        folder: the draft's folder, with its configuration.
        changed (*optional*): a sentence about what is different, if the draft drafts differently. Figures of a
            generated card are left out then.
    """
    text = read_text(source)
    path = Path(folder) / CARD_NAME
    if is_generated(text):
        replace_text(path, text)
        replace_text(path, str(make_card(folder, results=[] if changed else None)))
        return
    note = f"\n> {changed}\n" if changed else ""
    replace_text(path, f"{text.rstrip()}\n{note}\n<!-- {MARK} -->\n")


def load_card(folder: str | Path) -> ModelCard | None:
    """
    The card of a draft; `None` if there is none.

    Raises:
        MSDError: when its metadata cannot be read.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        return None
    try:
        return ModelCard(read_text(path))
    except MSDError:
        raise
    except Exception as error:  # of many kinds, for broken YAML and for results of another form
        raise MSDError(f"The metadata of {str(path)!r} cannot be read: {one_line(describe_error(error))}") from error


def read_draft_config(folder: str | Path) -> dict[str, Any]:
    """
    The configuration of a draft of this package.

    Raises:
        MSDError: when there is none in the folder.
    """
    config = read_config(Path(folder))
    if config.get("model_type") not in _KINDS:
        raise MSDError(
            f"{str(folder)!r} does not hold a draft of this package (`config.json` with model_type 'msd_draft'). "
            "`msd-hf convert` converts drafts of the original repository."
        )
    return config


def read_text(path: Path) -> str:
    """
    The text of a file.

    Raises:
        MSDError: when it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise MSDError(f"{str(path)!r} cannot be read: {reason}.") from error


# ---- what the card says ----


def _metadata(card: ModelCard | None) -> dict[str, Any]:
    return {} if card is None else dict(vars(card.data))


def _is_text_only(config: Mapping[str, Any]) -> bool:
    """A text-only target is its own decoder, so that both kinds are one."""
    kinds = (config.get("target_model_type"), config.get("target_text_model_type"))
    return kinds[0] is not None and kinds[0] == kinds[1]


def _read_provenance(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE_NAME
    if not path.is_file():
        return {}
    try:
        provenance = json.loads(read_text(path))
    except ValueError as error:
        raise MSDError(f"{str(path)!r} is not JSON: {one_line(str(error))}.") from error
    return redact(provenance) if isinstance(provenance, dict) else {}


def _base_link(target: Any) -> str:
    if is_hub_id(target):
        return f"[{target}](https://huggingface.co/{target})"
    return f"the target {_text(target)}" if isinstance(target, str) else "its target (which was not recorded)"


def _license_sentence(license: Any, target: Any) -> str:
    if license:
        return f"{_text(license)}."
    whose = _base_link(target) if isinstance(target, str) else "its target"
    return f"not stated. The draft was trained on hidden states of {whose}, whose licence may bind it."


def _parts(config: Mapping[str, Any]) -> str:
    """What the draft has of its own, and what it uses of the target."""
    if config.get("model_type") in ("msd_draft", "vispec_draft"):
        return (
            "The draft has neither an embedding nor a head. It uses those of the target, and is of no use without it."
        )
    own = "an embedding and a head of its own" if config.get("has_own_embedding") else "a head of its own"
    return f"The draft has {own}. It reads hidden states of the target, and is of no use without it."


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    size, vocab_size = config.get("draft_vocab_size"), config.get("vocab_size")
    layers, num_layers = config.get("target_layers"), config.get("num_hidden_layers")
    reads = "the target's last hidden states" + (f", and layers {layers}" if layers else "")
    if config.get("model_type") == "eagle3_draft":
        ids = config.get("eagle_aux_hidden_state_layer_ids")
        reads = "three hidden states of the target" if ids is None else f"hidden states {ids} of the target"
    if config.get("model_type") == "vispec_draft":
        reads += ", and few vectors of each image"
    if config.get("global_image_vector"):
        reads += ", and one vector of all images"
    facts = {
        "target": _text(config.get("target_name_or_path") or "not recorded"),
        "target's revision": _text(config.get("target_revision") or "not recorded"),
        "kind of target": _text(config.get("target_model_type") or "not recorded"),
        "draft": f"{num_layers} layer{'s' if num_layers != 1 else ''} of width {config.get('hidden_size')}",
        "reads": reads,
        "vocabulary": "the target's"
        if size is None
        else f"{_count(size)} of the target's {_count(vocab_size)} tokens",
    }
    return list(facts.items())


def _training(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not provenance:
        return []
    data, versions = _dict(provenance.get("data")), _dict(provenance.get("versions"))
    skipped = [number for number in _dict(data.get("skipped")).values() if isinstance(number, int)]
    steps, most = provenance.get("step"), provenance.get("max_steps")
    samples = {f"{kind} samples": data.get(kind) for kind in ("text", "visual")}
    facts = {
        "recipe": provenance.get("recipe"),
        "steps": steps if steps == most or most is None else f"{steps} of {most}",
        **{name: None if number is None else _count(number) for name, number in samples.items()},
        "skipped samples": sum(skipped) or None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, _text(value)) for name, value in facts.items() if value not in (None, "")]


def _taus(provenance: Mapping[str, Any]) -> dict[str, float]:
    names = {"eval_tau": "all", "eval_tau_text": "text", "eval_tau_visual": "visual"}
    metrics = _dict(provenance.get("metrics"))
    return {kind: metrics[name] for name, kind in names.items() if isinstance(metrics.get(name), int | float)}


# Somebody may have edited the file: an entry of another kind is passed over, or shown as it is.


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _text(value)


def _text(value: Any) -> str:
    """A value in one line of Markdown, in which it can end neither a cell nor a comment."""
    return one_line(" ".join(str(value).split())).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


__all__ = [
    "CARD_NAME",
    "MARK",
    "PROVENANCE_NAME",
    "check_card",
    "copy_card",
    "is_generated",
    "load_card",
    "make_card",
    "read_draft_config",
    "update_results",
    "write_card",
]
