"""The ViSpec draft model (arXiv 2509.15235): compressed images, and a vector of the last image at each text row."""

from __future__ import annotations

import torch
from torch import nn

from ..modeling_msd import MSDDraftModel
from .adaptor import ImageAdaptor, runs_of
from .configuration import ViSpecDraftConfig


class ViSpecDraftModel(MSDDraftModel):
    """
    A ViSpec draft, passed to the target's `generate` as `assistant_model`. Published drafts load as they are.

    An adaptor makes `num_queries` vectors of the patches of each image. All but the last are the rows that the draft
    reads of the image, in place of its patches. The last is fed to every text row behind the image, until the next
    one. Each run of visual positions counts as an image, and has its own rows.

    Settings are attributes of `draft.generation_config`, as in [`MSDDraftModel`].

    Args:
        config (`ViSpecDraftConfig`): sizes of the draft.
    """

    config_class = ViSpecDraftConfig
    visual_positions = "compressed"

    def __init__(self, config: ViSpecDraftConfig):
        super().__init__(config)
        size = config.hidden_size
        self.imadpt = ImageAdaptor(config)
        self.img_fc = nn.Linear(2 * size, size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ImageAdaptor):
            nn.init.normal_(module.q, std=self.config.initializer_range)

    @property
    def rows_per_image(self) -> int:  # type: ignore[override]
        """Rows that the draft reads of an image."""
        return self.config.num_queries - 1

    def compress_images(
        self, inputs_embeds: torch.Tensor, visual_mask: torch.Tensor, earlier: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Compresses the images of a prompt.

        Args:
            inputs_embeds (`torch.Tensor` of shape `[B, L, H]`): embeddings of all rows.
            visual_mask (`torch.BoolTensor` of shape `[B, L]`): the visual rows; each run is an image.
            earlier (`torch.Tensor` of shape `[B, 1, H]`, *optional*): the vector of the last image before the prompt.

        Returns:
            The embeddings `[B, L, H]`, in which the last `rows_per_image` rows of each image hold its compressed rows;
            and the vectors `[B, L, H]` that [`~MSDDraftModel.fuse`] adds to text rows, at the rows of an image those
            that are added behind it, or `None` without any image so far.
        """
        runs = list(runs_of(visual_mask))
        if not runs and earlier is None:
            return inputs_embeds, None
        inputs_embeds = inputs_embeds.clone()
        vectors = torch.zeros_like(inputs_embeds)
        if earlier is not None:
            vectors += earlier
        for row, start, end in runs:
            adapted = self.imadpt(inputs_embeds[row, start:end])
            count = min(self.rows_per_image, end - start)
            inputs_embeds[row, end - count : end] = adapted[self.rows_per_image - count : self.rows_per_image]
            vectors[row, start:] = self._added(adapted[-1])
        return inputs_embeds, vectors

    def _added(self, image: torch.Tensor) -> torch.Tensor:
        """What the global vector of an image `[H]` adds to the result of `fc`, `[H]`: both `fc` and `img_fc` are
        linear."""
        nothing = torch.zeros_like(image)
        both = torch.stack([image, nothing])
        state = self.img_fc(torch.cat([torch.zeros_like(both), both], dim=-1))
        state = torch.stack([state[0] - state[1], nothing])
        result = self.fc(torch.cat([torch.zeros_like(state), state], dim=-1))
        return result[0] - result[1]

    def fuse(
        self,
        inputs_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        visual_mask: torch.Tensor | None = None,
        layer_states: torch.Tensor | None = None,
        image_vectors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The input of the first layer: `fc([embedding ; img_fc([hidden state ; image])])` at text positions, and the
        embedding alone at visual positions, which holds a compressed row of the image. The arguments are those of
        [`MSDDraftModel.fuse`], `image_vectors` those of [`~ViSpecDraftModel.compress_images`].
        """
        hidden_states = self.img_fc(torch.cat([hidden_states, torch.zeros_like(hidden_states)], dim=-1))
        return super().fuse(inputs_embeds, hidden_states, visual_mask, layer_states, image_vectors)


__all__ = ["ViSpecDraftModel"]
