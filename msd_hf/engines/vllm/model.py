"""The draft as a model of vLLM's EAGLE method. vLLM imports this module by the name that the plugin registers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, _merge_multimodal_embeddings

from ...errors import MSDUnsupportedError
from .positions import sequence_positions


class MSDDraftLayerForVLLM(LlamaDecoderLayer):
    """A decoder layer of the draft. `config.input_layernorm` says whether the first one normalises its input."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, config: Any, is_first: bool):
        super().__init__(vllm_config, prefix=prefix, config=config)
        if is_first and not config.input_layernorm:
            self.input_layernorm = nn.Identity()

    def get_quant_config(self, vllm_config: VllmConfig) -> None:
        return None  # the weights of an exported draft are not quantised, also if the target's are


# By name, because the annotations of this module are texts.
@support_torch_compile(dynamic_arg_dims={"inputs_embeds": 0, "hidden_states": 0, "positions": 0, "is_visual": 0})
class MSDDraftLayersForVLLM(nn.Module):
    """Fusion and decoder layers. T tokens of all sequences lie side by side."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.speculative_config.draft_model_config.hf_config
        # vLLM puts the target's embedding in its place.
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.fc = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            params_dtype=vllm_config.model_config.dtype,
            prefix=f"{prefix}.fc",
            return_bias=False,
        )
        # Caches are known by the numbers of layers, which go on behind the target's.
        first = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.layers = nn.ModuleList(
            MSDDraftLayerForVLLM(vllm_config, f"{prefix}.layers.{first + number}", config, number == 0)
            for number in range(config.num_hidden_layers)
        )

    def forward(
        self,
        inputs_embeds: torch.Tensor,  # [T, H]
        hidden_states: torch.Tensor,  # [T, H]
        positions: torch.Tensor,  # [T]
        is_visual: torch.Tensor,  # [T]
    ) -> torch.Tensor:  # [T, H]
        states = self.fc(torch.cat([inputs_embeds, hidden_states], dim=-1))
        if self.config.decouple_visual_tokens:
            states = torch.where(is_visual.unsqueeze(-1), inputs_embeds, states)
        residual = None
        for layer in self.layers:
            states, residual = layer(positions, states, residual)
        return states + residual


class MSDDraftForVLLM(nn.Module):
    """
    The draft of an exported folder: `fc`, decoder layers, and for a draft with a vocabulary of its own the rows of the
    target's head. Embedding and, without such a vocabulary, head are the target's.

    Raises:
        MSDUnsupportedError: with pipeline parallelism, or when the draft does not fit the target.
    """

    supports_multimodal_embeddings = True  # vLLM hands over the embeddings of images
    has_own_embed_tokens = False
    lm_head: Any  # the target's, or rows of it
    is_visual: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.speculative_config.draft_model_config.hf_config
        target = vllm_config.model_config
        _check(vllm_config)
        # The older runner reads this name from every target that it does not list.
        for_images = getattr(target.hf_config, "image_token_id", None)
        if for_images is not None and not hasattr(target.hf_config, "image_token_index"):
            target.hf_config.image_token_index = for_images
        self.model = MSDDraftLayersForVLLM(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.has_own_lm_head = config.draft_vocab_size is not None
        self.vocab_size = target.get_vocab_size()
        if self.has_own_lm_head:
            self.lm_head = ParallelLMHead(config.draft_vocab_size, config.hidden_size, prefix="lm_head")
            self.draft_tokens = nn.Parameter(torch.zeros(config.draft_vocab_size, dtype=torch.long), False)
        self.logits_processor = LogitsProcessor(config.draft_vocab_size or self.vocab_size)
        # `forward` is not told which tokens are visual, so `embed_input_ids`, which runs before it, notes it here. The
        # buffer keeps its address, because CUDA graphs read it.
        num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("is_visual", torch.zeros(num_tokens, dtype=torch.bool), persistent=False)
        # The older runner hands over the first axis of M-RoPE, and finds the draft's cache slots by it.
        self.mends_positions = target.uses_mrope and not vllm_config.use_v2_model_runner

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embeds tokens `[T]`, and notes which of them are visual.

        Args:
            input_ids (`torch.Tensor` of shape `[T]`): the token after each position of the target.
            multimodal_embeddings: the embeddings of images, in order.
            is_multimodal (`torch.BoolTensor` of shape `[T]`, *optional*): the tokens that they belong to.

        Returns:
            `torch.Tensor` of shape `[T, H]`.
        """
        num_tokens = len(input_ids)
        embeds = self.model.embed_tokens(input_ids)
        if is_multimodal is None or multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            self.is_visual[:num_tokens] = False
            return embeds
        self.is_visual[:num_tokens].copy_(is_multimodal, non_blocking=True)
        return _merge_multimodal_embeddings(embeds, multimodal_embeddings, is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            input_ids (`torch.Tensor` of shape `[T]`, *optional*): read if there are no `inputs_embeds`.
            positions (`torch.Tensor` of shape `[T]`): a buffer of the runner.
            hidden_states (`torch.Tensor` of shape `[T, H]`): of the target, or what this method returned.
            inputs_embeds (`torch.Tensor` of shape `[T, H]`, *optional*): result of `embed_input_ids`.

        Returns:
            The draft's states `[T, H]` twice: for the head, and for the next step.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        if self.mends_positions:
            self._mend(positions)
        states = self.model(inputs_embeds, hidden_states, positions, self.is_visual[: len(inputs_embeds)])
        return states, states

    def _mend(self, positions: torch.Tensor) -> None:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a run that only measures memory
            return
        first: Any = self.model.layers[0]
        metadata = metadata[first.self_attn.attn.layer_name]
        num_tokens = metadata.num_actual_tokens
        # In place: the runner reads the buffer again to find the slots of the next step.
        positions[:num_tokens] = sequence_positions(metadata, num_tokens)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Scores `[T, V]` over the target's vocabulary; minus infinity for tokens that the draft never proposes."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is None or not self.has_own_lm_head:
            return logits
        full = logits.new_full((len(logits), self.vocab_size), float("-inf"))
        full[:, self.draft_tokens] = logits
        return full

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the weights of an exported folder; returns the names of the parameters that have their values."""
        mapper = WeightsMapper(
            orig_to_new_prefix={"fc.": "model.fc.", "layers.": "model.layers."},
            orig_to_new_stacked={
                ".q_proj": (".qkv_proj", "q"),
                ".k_proj": (".qkv_proj", "k"),
                ".v_proj": (".qkv_proj", "v"),
                ".gate_proj": (".gate_up_proj", 0),
                ".up_proj": (".gate_up_proj", 1),
            },
        )
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        return {*loaded, "model.embed_tokens.weight"}


def _check(vllm_config: VllmConfig) -> None:
    config, target = vllm_config.speculative_config.draft_model_config.hf_config, vllm_config.model_config
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise MSDUnsupportedError(
            "An MSD draft has no embedding of its own, and with --pipeline-parallel-size the target's is on another "
            "stage: use --tensor-parallel-size."
        )
    if target.get_hidden_size() != config.hidden_size:
        raise MSDUnsupportedError(
            f"The draft's hidden size {config.hidden_size} does not match the target's {target.get_hidden_size()}: "
            "export the draft that was made for this target."
        )


__all__ = ["MSDDraftForVLLM"]
