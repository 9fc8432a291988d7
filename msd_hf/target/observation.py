"""The inputs and outputs of a target's decoder, read by hooks that exist for one forward at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..draft.interface import TargetReads


@dataclass
class TargetObservation:
    """The inputs and outputs of the decoder in the last forward.

    Args:
        reads (`TargetReads`): the hidden states that are kept.
        inputs (`dict[str, Any]`): the decoder's inputs, by name.
        last_hidden_state (`torch.Tensor` of shape `[B, T, H]`): after the final norm; `None` before the first forward.
        layer_states (`dict[int, torch.Tensor]`): the outputs of the layers that are read.
    """

    reads: TargetReads
    inputs: dict[str, Any] = field(default_factory=dict)
    last_hidden_state: torch.Tensor | None = None
    layer_states: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def hidden_states(self) -> torch.Tensor:
        """The states of the last forward that the draft reads, `[B, T, W]`; W is `TargetReads.width`."""
        last = self.last_hidden_state
        assert last is not None
        return self.reads.join([self.layer_states[layer].to(last.device) for layer in self.reads.layers], last)


@contextmanager
def observed(
    decoder: Any,
    reads: TargetReads,
    input_names: Sequence[str],
    is_compiled: bool,
    replaced_inputs: Mapping[str, Any],
) -> Iterator[TargetObservation]:
    """
    Watches the forwards of a target's decoder inside the block, as far as this thread runs them.

    Args:
        decoder (`nn.Module`): the target's decoder.
        reads (`TargetReads`): the hidden states to keep.
        input_names (`Sequence[str]`): names of the decoder's positional inputs, in order.
        is_compiled (`bool`): whether the user has compiled the target.
        replaced_inputs (`Mapping[str, Any]`): inputs that take the place of inputs of these names.
    """
    seen = TargetObservation(reads)
    thread = threading.get_ident()  # another thread may run the same target meanwhile

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
        *(decoder.layers[layer].register_forward_hook(after_layer(layer)) for layer in reads.layers),
    ]
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if is_compiled:
            # A compiled forward ignores hooks that were registered after its compilation.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield seen


__all__ = ["TargetObservation", "observed"]
