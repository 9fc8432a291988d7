"""What goes into a target's decoder and what comes out, by hooks that are in place for one forward at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class TargetObservation:
    """What went into the decoder in the last forward, and what came out.

    Args:
        inputs (`dict[str, Any]`): the decoder's, by name.
        last_hidden_state (`torch.Tensor` of shape `[B, T, H]`): after the final norm; `None` before the first forward.
        layer_states (`dict[int, torch.Tensor]`): the outputs of the feature layers.
    """

    inputs: dict[str, Any] = field(default_factory=dict)
    last_hidden_state: torch.Tensor | None = None
    layer_states: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def hidden_states(self) -> torch.Tensor:
        """`[B, T, (1 + K) * H]`, as in [`TargetPrefill`]."""
        assert self.last_hidden_state is not None
        if not self.layer_states:
            return self.last_hidden_state
        layers = [self.layer_states[layer].to(self.last_hidden_state.device) for layer in sorted(self.layer_states)]
        return torch.cat([*layers, self.last_hidden_state], dim=-1)


@contextmanager
def observed(
    decoder: Any,
    feature_layers: Sequence[int],
    input_names: Sequence[str],
    is_compiled: bool,
    replaced_inputs: Mapping[str, Any],
) -> Iterator[TargetObservation]:
    """
    Watches the forwards inside the block.

    Args:
        decoder (`nn.Module`): the target's.
        feature_layers (`Sequence[int]`): layers of which the outputs are kept.
        input_names (`Sequence[str]`): of what its forward takes, in order.
        is_compiled (`bool`): whether somebody has compiled it before.
        replaced_inputs (`Mapping[str, Any]`): what it gets in place of its own inputs.
    """
    seen = TargetObservation()
    thread = threading.get_ident()  # another one may run the same target meanwhile

    def before(module, args, kwargs):
        if threading.get_ident() != thread:
            return None
        seen.inputs = {**dict(zip(input_names, args, strict=False)), **kwargs}
        return (), {**seen.inputs, **replaced_inputs}

    def after(module, args, kwargs, output):
        if threading.get_ident() == thread:
            seen.last_hidden_state = output[0]

    def after_layer(layer):
        def keep(module, args, output):
            if threading.get_ident() == thread:
                seen.layer_states[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    handles: list[Any] = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
        *(decoder.layers[layer].register_forward_hook(after_layer(layer)) for layer in feature_layers),
    ]
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if is_compiled:
            # A compiled forward does not look at hooks that came after its compilation.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield seen


__all__ = ["TargetObservation", "observed"]
