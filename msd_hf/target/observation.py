"""The inputs and outputs of a target's decoder in the forwards of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..attention.block_selection import NodePlaces, choose_blocks, mask_of_blocks
from ..attention.substitution import Substitution, substituted
from ..compat import CACHE_NAME
from ..draft.interface import EMBEDDINGS, TargetReads
from ..errors import MSDUnsupportedError
from ..recurrent.kernels import along_tree
from ..recurrent.nodes import TreeNodes
from ..recurrent.replay import MixerCall
from .compiled_parts import CompiledPart, run_part
from .stand_in import standing_in


@dataclass
class TargetObservation:
    """The inputs and outputs of the decoder in the last forward that was observed.

    Args:
        decoder (`nn.Module`): the target's decoder.
        reads (`TargetReads`): the hidden states that are kept.
        input_names (`Sequence[str]`): names of the decoder's positional inputs, in order.
        cache (`Cache`, *optional*): the cache of the forwards to observe. Others are not observed, as they belong to
            a call inside of this one. `None`: all forwards.
        replaced_inputs (`Mapping[str, Any]`): inputs that take the place of the decoder's inputs of these names.
        attention (`Substitution`, *optional*): another attention function for these forwards.
        nodes (`TreeNodes`, *optional*): the trees along which recurrent layers run in these forwards.
        run (`Callable`, *optional*): runs the decoder's inputs in place of its `forward`.
        projections (`Sequence[nn.Module]`): modules of the decoder whose outputs are multiplied by `factors`.
        factors (`torch.Tensor` of shape `[B, T, 1]`, *optional*): needed with `projections`.
        indexers (`Sequence[nn.Module]`): modules of the decoder that choose blocks of slots.
        places (`NodePlaces`, *optional*): needed with `indexers`.
        mixers (`Sequence[nn.Module]`): modules of the decoder whose calls are kept in `mixer_calls`.
        inputs (`dict[str, Any]`): the decoder's inputs, by name.
        last_hidden_state (`torch.Tensor` of shape `[B, T, H]`): after the final norm; `None` before the first forward.
        layer_states (`dict[int, torch.Tensor]`): the outputs of the layers that are read, and the input of layer 0.
        mixer_calls (`list[MixerCall]`): the calls of `mixers` in the last forward.
    """

    decoder: Any
    reads: TargetReads
    input_names: Sequence[str]
    cache: Cache | None = None
    replaced_inputs: Mapping[str, Any] = field(default_factory=dict)
    attention: Substitution | None = None
    nodes: TreeNodes | None = None
    run: Callable[[dict[str, Any]], Any] | None = None
    projections: Sequence[nn.Module] = ()
    factors: torch.Tensor | None = None
    indexers: Sequence[nn.Module] = ()
    places: NodePlaces | None = None
    mixers: Sequence[nn.Module] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    last_hidden_state: torch.Tensor | None = None
    layer_states: dict[int, torch.Tensor] = field(default_factory=dict)
    mixer_calls: list[MixerCall] = field(default_factory=list)

    @property
    def hidden_states(self) -> torch.Tensor:
        """
        The states of the last forward that the draft reads, `[B, T, W]`; W is `TargetReads.width`.

        Raises:
            MSDUnsupportedError: when a layer that is read did not run, or hands on several streams.
        """
        last = self.last_hidden_state
        assert last is not None
        states = []
        for layer in self.reads.layers:
            state = self.layer_states.get(layer)
            if state is None or state.shape != last.shape:
                what = "the input of the first layer" if layer == EMBEDDINGS else f"layer {layer} (counted from 0)"
                reason = "did not run in this call" if state is None else "has several streams of states"
                raise MSDUnsupportedError(
                    f"The draft reads {what} of the target, which {reason}. Use a draft that reads other layers, or "
                    "call `generate` without `assistant_model`."
                )
            states.append(state.to(last.device))
        return self.reads.join(states, last)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's inputs by name."""
        return {**dict(zip(self.input_names, args, strict=False)), **kwargs}

    def concerns(self, decoder: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether a forward of a decoder with these inputs is one of those to observe."""
        return decoder is self.decoder and (self.cache is None or inputs.get(CACHE_NAME) is self.cache)


# Both belong to the surrounding call. Other threads have their own.
_awaited: ContextVar[TargetObservation | None] = ContextVar("msd_hf.awaited", default=None)  # its next forwards
_running: ContextVar[TargetObservation | None] = ContextVar("msd_hf.running", default=None)  # the decoder runs for it


@contextmanager
def observed(observation: TargetObservation, compiled_parts: Sequence[CompiledPart]) -> Iterator[TargetObservation]:
    """
    Observes forwards of a target's decoder inside the block, as far as the surrounding call runs them.

    Args:
        observation (`TargetObservation`): says which forwards, and keeps what is seen.
        compiled_parts (`Sequence[CompiledPart]`): parts of the target that the user has compiled. They run uncompiled,
            as compiled code would pass over what stands in for its methods.
    """
    decoder = observation.decoder
    with ExitStack() as stack:
        stack.enter_context(standing_in(decoder, "_call_impl", _run_decoder))
        if observation.run is not None:
            stack.enter_context(standing_in(decoder, "forward", _run_forward))
        for layer in {max(layer, 0) for layer in observation.reads.layers}:
            stack.enter_context(standing_in(decoder.layers[layer], "_call_impl", _run_layer))
        for projection in observation.projections:
            stack.enter_context(standing_in(projection, "_call_impl", _run_projection))
        for indexer in observation.indexers:
            stack.enter_context(standing_in(indexer, "forward", _run_indexer))
            stack.enter_context(standing_in(indexer, "build_block_mask", _run_block_mask))
        for mixer in observation.mixers:
            stack.enter_context(standing_in(mixer, "_call_impl", _run_mixer))
        for part in compiled_parts:
            stack.enter_context(standing_in(part.module, part.name, _run_uncompiled))
        stack.enter_context(_set(_awaited, observation))
        yield observation


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _run_decoder(module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    observation = _awaited.get()
    if observation is None and _running.get() is None:
        return method(*args, **kwargs)
    inputs = {} if observation is None else observation.named(args, kwargs)
    if observation is None or not observation.concerns(module, inputs):
        with _set(_running, None), substituted(None), along_tree(None):  # a call inside of the one that is observed
            return method(*args, **kwargs)
    observation.inputs = inputs
    around = substituted(observation.attention), along_tree(observation.nodes)
    with _set(_awaited, None), _set(_running, observation), around[0], around[1]:
        output = method(**{**inputs, **observation.replaced_inputs})
    observation.last_hidden_state = output[0]
    return output


def _run_forward(module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    observation = _running.get()
    if observation is None or observation.run is None or module is not observation.decoder:
        return method(*args, **kwargs)
    return observation.run(observation.named(args, kwargs))


def _run_layer(module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    output = method(*args, **kwargs)
    observation = _running.get()
    if observation is not None:
        for layer in observation.reads.layers:
            if observation.decoder.layers[max(layer, 0)] is not module:
                continue
            if layer == EMBEDDINGS:
                states = args[0] if args else kwargs["hidden_states"]
            else:
                states = output[0] if isinstance(output, tuple) else output
            # Layers of Gemma 3n have several streams, `[streams, B, T, H]`; the draft reads the first.
            observation.layer_states[layer] = states[0] if states.dim() == 4 else states
    return output


def _run_projection(
    module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    output = method(*args, **kwargs)
    observation = _running.get()
    if observation is None or not any(module is projection for projection in observation.projections):
        return output
    assert observation.factors is not None
    return (output * observation.factors.to(output.device)).to(output.dtype)


def _run_indexer(module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    observation = _running.get()
    if observation is None or observation.places is None:
        return method(*args, **kwargs)
    return choose_blocks(module, observation.places, *args, **kwargs)


def _run_block_mask(
    module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    observation = _running.get()
    if observation is None or observation.places is None:
        return method(*args, **kwargs)
    chosen, tree_mask, _, dtype, *_ = args
    return mask_of_blocks(module, observation.places, chosen, tree_mask, dtype)


def _run_mixer(module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    observation = _running.get()
    if observation is not None and observation.mixers:
        num_tokens = observation.replaced_inputs["position_ids"].shape[-1]
        observation.mixer_calls.append(MixerCall(module, args, kwargs, num_tokens))
    return method(*args, **kwargs)


def _run_uncompiled(
    module: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if _awaited.get() is None and _running.get() is None:
        return method(*args, **kwargs)
    return run_part(module, method, args, kwargs)


__all__ = ["TargetObservation", "observed"]
