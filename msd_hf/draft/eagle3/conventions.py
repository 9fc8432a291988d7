"""Reads what a published EAGLE-3 checkpoint means, from its tensors first and from its `config.json` second.

Programs that write and read these files differ in what they mean by some entries, and leave others out.
`examples/OTHER_DRAFTS.md` has the table of readings. A reading that another program would not share
is named in a warning, unless the field is given to `from_pretrained` by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import MSDCheckpointError
from ...hub.names import public_name
from ..translation import LLAMA_FIELDS, rope_of
from ..weights import StoredWeight


AUX_IDS = "eagle_aux_hidden_state_layer_ids"
OWN_LAYER = "midlayer."  # the first layer in the files of the authors
_OLD_NORMS = {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}
PLACEHOLDER, IMAGE = "placeholder", "image_embedding"


@dataclass
class Reading:
    """
    What a checkpoint means.

    Args:
        fields (`dict[str, Any]`): fields of an [`Eagle3DraftConfig`].
        key_mapping (`dict[str, str]`): regular expressions of names of weights, and the draft's names.
        doubts (`dict[str, str]`): readings that others would not share: for each field, a sentence.
    """

    fields: dict[str, Any]
    key_mapping: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)


def renamed(name: str, key_mapping: Mapping[str, str]) -> str:
    """The draft's name of a weight."""
    for pattern, replacement in key_mapping.items():
        name = re.sub(pattern, replacement, name)
    return name


def read_eagle3(
    config: Mapping[str, Any], headers: Mapping[str, StoredWeight], source: str, given: Collection[str] = ()
) -> Reading:
    """
    Reads an EAGLE-3 checkpoint in the flat format or in that of speculators.

    Args:
        config (`Mapping`): its `config.json`.
        headers (`Mapping`): shape and dtype of its weights.
        source (`str`): name of the checkpoint, for error messages.
        given (`Collection[str]`): fields that are given by name, and so leave no doubt.

    Raises:
        MSDCheckpointError: when a weight is missing that tells the sizes, or the sizes contradict each other.
    """
    key_mapping = _key_mapping(headers, source)
    shapes = {renamed(name, key_mapping): weight.shape for name, weight in headers.items()}
    is_speculators = isinstance(config.get("transformer_layer_config"), Mapping)
    layer = config["transformer_layer_config"] if is_speculators else config
    more = config.get("eagle_config")
    options = {**more, **config} if isinstance(more, Mapping) else config
    reading = Reading({name: layer[name] for name in LLAMA_FIELDS if layer.get(name) is not None}, key_mapping)
    _read_sizes(reading.fields, options, layer, shapes, source)
    _read_norms(reading, options, shapes, is_speculators)
    _read_aux_ids(reading, config, is_speculators, shapes, source)
    _read_positions(reading, layer)
    _read_visual_positions(reading, is_speculators)
    reading.doubts = {name: text for name, text in reading.doubts.items() if name not in given}
    reading.fields["target_name_or_path"] = _target_name(config)
    return reading


def _key_mapping(headers: Mapping[str, StoredWeight], source: str) -> dict[str, str]:
    names = list(headers)
    mapping = {}
    if any(name.startswith(OWN_LAYER) for name in names):
        if any(name.startswith("layers.0.") for name in names):
            raise MSDCheckpointError(
                f"The weights in {source!r} hold a first layer twice, as `midlayer.` and as `layers.0.`: remove one."
            )
        mapping[r"^midlayer\."] = "layers.0."
    mapping |= {rf"^{old}\.": f"{new}." for old, new in _OLD_NORMS.items() if f"{old}.weight" in headers}
    # SGLang writes the norms before later layers by the name that the first layer has for its hidden states.
    if any(re.fullmatch(r"layers\.[1-9]\d*\.hidden_norm\.weight", name) for name in names):
        mapping[r"^layers\.([1-9]\d*)\.hidden_norm\."] = r"layers.\1.input_layernorm."
    return mapping


def _read_sizes(
    fields: dict[str, Any],
    options: Mapping[str, Any],
    layer: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """The sizes that tensors tell."""
    needed = ("fc.weight", "lm_head.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight")
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing:
        raise MSDCheckpointError(
            f"The weights in {source!r} look like an EAGLE-3 draft, but there is no matrix {', '.join(missing)}."
        )
    size, width = shapes["fc.weight"]
    fields["hidden_size"] = size
    fields["intermediate_size"] = shapes["layers.0.mlp.gate_proj.weight"][0]
    numbers = [int(found.group(1)) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name))]
    fields["num_hidden_layers"] = max(numbers) + 1
    fields["attention_bias"] = "layers.0.self_attn.q_proj.bias" in shapes
    fields["mlp_bias"] = "layers.0.mlp.gate_proj.bias" in shapes
    fields["fc_bias"] = "fc.bias" in shapes
    fields["qk_norm"] = "layers.0.self_attn.q_norm.weight" in shapes
    num_heads = layer.get("num_attention_heads")
    if fields.get("head_dim") is None and isinstance(num_heads, int) and num_heads > 0:
        fields["head_dim"] = shapes["layers.0.self_attn.q_proj.weight"][0] // num_heads
    embedding = shapes.get("embed_tokens.weight")
    fields["has_own_embedding"] = embedding is not None
    num_rows = shapes["lm_head.weight"][0]
    fields["draft_vocab_size"] = num_rows if "d2t" in shapes else None
    if embedding is not None:
        fields["vocab_size"] = embedding[0]
    elif "d2t" not in shapes:
        fields["vocab_size"] = num_rows
    elif "t2d" in shapes:
        fields["vocab_size"] = shapes["t2d"][0]
    target_size = options.get("target_hidden_size")
    if target_size is not None and target_size != size:
        fields["target_hidden_size"] = target_size
    norm = shapes.get("fc_norm.0.weight")
    part = norm[0] if norm else target_size if isinstance(target_size, int) and target_size > 0 else size
    if width % part or width == 0:
        raise MSDCheckpointError(
            f"The weight `fc.weight` in {source!r} reads {width} numbers, which are no whole number of hidden states "
            f"of width {part}: give `target_hidden_size`."
        )
    if part != size:
        fields["target_hidden_size"] = part


def _read_norms(
    reading: Reading, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], is_speculators: bool
) -> None:
    fields, doubts = reading.fields, reading.doubts
    for name, weight, flags in (
        ("norm_before_fc", "input_norm.weight", ("norm_before_fc",)),
        ("fc_norm", "fc_norm.0.weight", ("fc_norm", "use_aux_norm")),
    ):
        fields[name] = weight in shapes
        said = next((options[flag] for flag in flags if options.get(flag) is not None), None)
        if said is not None and bool(said) != fields[name]:
            there = "has" if fields[name] else "has no"
            doubts[name] = f"is {said} in the configuration, but the checkpoint {there} `{weight}`: {fields[name]}"
    value = options.get("norm_before_residual")
    fields["norm_before_residual"] = bool(value)
    if value is None and is_speculators:
        doubts["norm_before_residual"] = "is missing; speculators takes it for False (as here), vLLM for True"
    fields["norm_output"] = bool(options.get("norm_output"))
    if fields["norm_output"] and not is_speculators:
        doubts["norm_output"] = (
            "is True; here and in speculators the draft is fed its output after the final norm, in SpecForge the one "
            "before it (False)"
        )


def _read_aux_ids(
    reading: Reading,
    config: Mapping[str, Any],
    is_speculators: bool,
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """Which hidden states are read, as transformers counts them."""
    ids = config.get(AUX_IDS)
    more = config.get("eagle_config")
    is_plain = isinstance(ids, list) and all(isinstance(number, int) for number in ids)
    if ids is None and isinstance(more, Mapping):
        ids = more.get(AUX_IDS)
        is_plain = isinstance(ids, list) and all(isinstance(number, int) for number in ids)
        if is_plain:
            assert isinstance(ids, list)
            written, ids = ids, [number + 1 for number in ids]
            reading.doubts[AUX_IDS] = (
                f"is {written} in `eagle_config`; here and in SGLang and ModelOpt these count outputs of "
                f"layers from 0, hidden states {ids}; in vLLM hidden states {written}"
            )
    if ids is None:
        return
    if not is_plain:
        raise MSDCheckpointError(f"{source!r}: `{AUX_IDS}` must be a list of numbers, got {str(ids)[:80]}.")
    assert isinstance(ids, list)
    num_parts = shapes["fc.weight"][1] // (reading.fields.get("target_hidden_size") or reading.fields["hidden_size"])
    if len(ids) != num_parts:
        raise MSDCheckpointError(
            f"{source!r}: `{AUX_IDS}` names {len(ids)} hidden states, but `fc.weight` reads {num_parts}."
        )
    reading.fields[AUX_IDS] = sorted(ids)


def _read_positions(reading: Reading, layer: Mapping[str, Any]) -> None:
    rope = layer.get("rope_parameters")
    has_theta = layer.get("rope_theta") is not None or (isinstance(rope, Mapping) and rope.get("rope_theta"))
    reading.fields["rope_parameters"] = rope_of(layer)
    if not has_theta:
        reading.doubts["rope_parameters"] = (
            "has no `rope_theta`; here and in all programs that were compared it is 10000, never the target's"
        )


def _read_visual_positions(reading: Reading, is_speculators: bool) -> None:
    """As in the engine that the format comes from: vLLM feeds the placeholder, SGLang the image's embedding."""
    size = reading.fields["hidden_size"]
    is_narrow = reading.fields.get("target_hidden_size") not in (None, size)
    reading.fields["visual_positions"] = PLACEHOLDER if is_speculators or is_narrow else IMAGE


def _target_name(config: Mapping[str, Any]) -> str | None:
    speculators = config.get("speculators_config")
    verifier = speculators.get("verifier") if isinstance(speculators, Mapping) else None
    name = verifier.get("name_or_path") if isinstance(verifier, Mapping) else None
    return public_name(name)[0] if isinstance(name, str) and name else None


__all__ = ["AUX_IDS", "IMAGE", "OWN_LAYER", "PLACEHOLDER", "Reading", "read_eagle3", "renamed"]
