"""Tiny random targets of every family, and inputs of `generate` for them: images, videos, left-padded batches.

The targets are built from configurations alone. Prompts are expanded as the family's processor expands them; a model
refuses images whose features do not match the image tokens in number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image


VOCAB_SIZE = 80
HIDDEN_SIZE = 32
PAD_TOKEN_ID = 0
FIRST_TEXT_TOKEN_ID, NUM_TEXT_TOKENS = 3, 72
# Tokens that processors put between the rows of an image, after and before it, and as placeholders of pictures.
BREAK_TOKEN_ID, END_TOKEN_ID, START_TOKEN_ID, VIDEO_TOKEN_ID, IMAGE_TOKEN_ID = range(75, VOCAB_SIZE)
SPECIAL_TOKEN_IDS = [PAD_TOKEN_ID, *range(BREAK_TOKEN_ID, VOCAB_SIZE)]
IMAGE_SIZE = 16
WINDOW = 8  # width of sliding attention; shorter than the prompts


@dataclass
class Picture:
    """An image or a video.

    Args:
        tokens: its tokens in the prompt.
        pixels: its input of the vision tower.
        size: its size as the family's processor reports it: height and width, or the grid of its patches.
    """

    tokens: list[int]
    pixels: torch.Tensor
    size: tuple[int, ...] = ()


@dataclass
class Prompt:
    """One row of a batch, before padding."""

    tokens: list[int]
    images: list[Picture] = field(default_factory=list)
    videos: list[Picture] = field(default_factory=list)


Rows = list[list[Picture]]


def _stack(rows: Rows) -> dict[str, Any]:
    return {"pixel_values": torch.cat([picture.pixels for row in rows for picture in row])}


@dataclass(frozen=True)
class Family:
    """A kind of target.

    Args:
        name: its key in `FAMILIES`.
        model_class: name of the class in transformers.
        config: makes the configuration of a tiny model.
        draw_image: makes an image from a generator, the image's number (which selects its size) and the number of
            images in the prompt.
        draw_video: makes a video from a generator and the video's number.
        collate_images, collate_videos: make arguments of `generate` from the pictures of all rows.
        place_images: makes further arguments from the prompts' tokens `[B, L]` and the images of all rows.
        token_types: name of the argument with token types (text 0, image 1, video 2), and whether images and videos
            are marked in it.
        embedding_std: standard deviation of the random embeddings. Gemma multiplies embeddings by the square root of
            the hidden size.
        attentions: attention implementations that it supports. Gemma 2 caps its attention scores, which sdpa cannot
            do: transformers 5.10 runs sdpa without the cap, 5.24 refuses it.
        eager_left_padding: whether eager attention gives finite numbers for padded rows in float64. Most families
            compute the softmax in float32, in which the mask's minimum is -inf, so padded rows become NaN.
        float32_parts: whether a float64 model weights experts, or rotates queries and keys, in float32.
        compiles: whether `compile=True` can be used.
    """

    name: str
    model_class: str
    config: Callable[[], PreTrainedConfig]
    draw_image: Callable[[torch.Generator, int, int], Picture] | None = None
    draw_video: Callable[[torch.Generator, int], Picture] | None = None
    collate_images: Callable[[Rows], dict[str, Any]] = _stack
    collate_videos: Callable[[Rows], dict[str, Any]] | None = None
    place_images: Callable[[torch.Tensor, Rows], dict[str, Any]] | None = None
    token_types: tuple[str, bool] | None = None
    embedding_std: float = 1.0
    attentions: tuple[str, ...] = ("sdpa", "eager")
    eager_left_padding: bool = False
    float32_parts: bool = False
    compiles: bool = True

    @property
    def has_images(self) -> bool:
        return self.draw_image is not None

    @property
    def has_videos(self) -> bool:
        return self.draw_video is not None

    def build(
        self, seed: int = 0, attention: str | None = None, dtype: torch.dtype = torch.float64, **text_fields: Any
    ) -> PreTrainedModel:
        """A model with random weights. They are large enough that generated text varies and that images change it."""
        config = self.config()
        for name, value in text_fields.items():
            setattr(config.get_text_config(decoder=True), name, value)
        with torch.random.fork_rng(devices=[]):
            set_seed(seed)
            model = getattr(transformers, self.model_class)(config)
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=self.embedding_std)
            torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
            # With the default initialisation, images would hardly change the decoder's output.
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and any(part in name for part in ("patch_conv", "patch_embed")):
                    torch.nn.init.normal_(parameter, std=2 * parameter[0].numel() ** -0.5)
                elif parameter.ndim > 1 and any(part in name for part in ("projector", "connector", "merger")):
                    torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
                elif "cross_attn" in name and name.endswith("gate"):
                    torch.nn.init.ones_(parameter)  # a closed gate would hide the images
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD_TOKEN_ID
        model.set_attn_implementation(attention or self.attentions[0])
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others compute in float32 at most
        return model.to(dtype).eval()

    def prompt(
        self,
        seed: int,
        num_images: int = 0,
        place: str = "middle",
        num_text: int = 8,
        num_videos: int = 0,
        first_size: int | None = None,
    ) -> Prompt:
        """
        A prompt of random text and pictures.

        Args:
            place: where pictures stand: "first", "last", or "middle" (spread between the text tokens).
            first_size: number that selects the first picture's size; the others count on from it (default: `seed`).
        """
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(
            FIRST_TEXT_TOKEN_ID, FIRST_TEXT_TOKEN_ID + NUM_TEXT_TOKENS, (num_text,), generator=generator
        ).tolist()
        first_size = seed if first_size is None else first_size
        images, videos = [], []
        for number in range(num_images):
            assert self.draw_image is not None
            images.append(self.draw_image(generator, first_size + number, num_images))
        for number in range(num_videos):
            assert self.draw_video is not None
            videos.append(self.draw_video(generator, first_size + number))
        pictures = [*images, *videos]
        tokens: list[int] = []
        for position in range(num_text + 1):
            for number, picture in enumerate(pictures):
                spread = (number + 1) * num_text // (len(pictures) + 1)
                if position == {"first": 0, "last": num_text, "middle": spread}[place]:
                    tokens += picture.tokens
            tokens += text[position : position + 1]
        return Prompt(tokens, images, videos)

    def collate(self, prompts: list[Prompt], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Inputs of `generate`: a batch of prompts, shorter ones padded on the left."""
        length = max(len(prompt.tokens) for prompt in prompts)
        ids = torch.tensor([[PAD_TOKEN_ID] * (length - len(prompt.tokens)) + prompt.tokens for prompt in prompts])
        padding = torch.tensor([length - len(prompt.tokens) for prompt in prompts])
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": (torch.arange(length) >= padding.unsqueeze(1)).long(),
        }
        if any(prompt.images for prompt in prompts):
            inputs.update(self.collate_images([prompt.images for prompt in prompts]))
            if self.place_images is not None:
                inputs.update(self.place_images(ids, [prompt.images for prompt in prompts]))
        if any(prompt.videos for prompt in prompts):
            assert self.collate_videos is not None
            inputs.update(self.collate_videos([prompt.videos for prompt in prompts]))
        if self.token_types is not None:
            name, has_marks = self.token_types
            types = torch.zeros_like(ids)
            if has_marks:
                types = types + (ids == IMAGE_TOKEN_ID).long() + 2 * (ids == VIDEO_TOKEN_ID).long()
            inputs[name] = types
        return {name: value.to(dtype) if value.dtype.is_floating_point else value for name, value in inputs.items()}

    def inputs(self, seed: int, num_images: int = 0, place: str = "middle", **options: Any) -> dict[str, Any]:
        """Inputs of `generate` for one prompt, see [`~Family.prompt`]."""
        return self.collate([self.prompt(seed, num_images, place, **options)])


# Decoders


def _decoder(config_class: str, **fields: Any) -> PreTrainedConfig:
    return getattr(transformers, config_class)(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "pad_token_id": PAD_TOKEN_ID,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
            **fields,
        }
    )


_ALTERNATING = ["sliding_attention", "full_attention"]
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _llama(**fields: Any) -> PreTrainedConfig:
    return _decoder("LlamaConfig", **fields)


def _qwen2(**fields: Any) -> PreTrainedConfig:
    return _decoder("Qwen2Config", **fields)


def _qwen3(**fields: Any) -> PreTrainedConfig:
    return _decoder("Qwen3Config", **{"head_dim": 16, **fields})


def _mistral(**fields: Any) -> PreTrainedConfig:
    return _decoder("MistralConfig", **{"sliding_window": WINDOW, **fields})


def _gemma(**fields: Any) -> PreTrainedConfig:
    return _decoder("GemmaConfig", **{"head_dim": 16, **fields})


def _gemma2(**fields: Any) -> PreTrainedConfig:
    return _decoder(
        "Gemma2Config",
        **{
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": list(_ALTERNATING),
            # Low enough that capping changes logits and attention scores.
            "final_logit_softcapping": 8.0,
            "attn_logit_softcapping": 3.0,
            **fields,
        },
    )


def _gemma3(**fields: Any) -> PreTrainedConfig:
    return _decoder(
        "Gemma3TextConfig",
        **{
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": list(_ALTERNATING),
            **fields,
        },
    )


CHUNK = 6  # of attention in chunks; a tree reaches over the end of one


def _llama4(**fields: Any) -> PreTrainedConfig:
    """Layers in chunks and one without rotary embeddings, whose scale changes every few tokens."""
    return _decoder(
        "Llama4TextConfig",
        **{
            "head_dim": 8,
            "num_hidden_layers": 4,
            "num_local_experts": 3,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": CHUNK,
            "no_rope_layers": [1, 0, 1, 1],
            "layer_types": [*["chunked_attention", "full_attention"] * 2],
            "floor_scale": 5,
            "attn_scale": 1.0,
            **fields,
        },
    )


def _deepseek(config_class: str, **fields: Any) -> PreTrainedConfig:
    """Layers with an indexer, which chooses fewer slots than the prompt has. It has many heads, because scores of 0,
    which are equal, would be chosen in another order in a tree."""
    return _decoder(
        config_class,
        **{
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "index_n_heads": 16,
            "index_head_dim": 16,
            "index_topk": 6,
            **fields,
        },
    )


def _gemma4(config_class: str = "Gemma4TextConfig", **fields: Any) -> PreTrainedConfig:
    """The large kinds: full attention has wider heads and fewer of them, whose keys are also its values."""
    return _decoder(
        config_class,
        **{
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "sliding_window": WINDOW,
            "layer_types": list(_ALTERNATING),
            "final_logit_softcapping": 8.0,
            "use_bidirectional_attention": "vision",
            **fields,
        },
    )


# The last layers share the keys of earlier ones, and each layer has an input of its own.
_EFFECTIVE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": _ALTERNATING * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}


def _gemma4_effective(**fields: Any) -> PreTrainedConfig:
    """The kinds E2B and E4B."""
    more = {"attention_k_eq_v": False, "use_bidirectional_attention": None, "use_double_wide_mlp": True}
    return _gemma4(**_EFFECTIVE, **more, **fields)


def _gemma3n_text(**fields: Any) -> PreTrainedConfig:
    return _decoder(
        "Gemma3nTextConfig",
        **{
            **_EFFECTIVE,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "final_logit_softcapping": 8.0,
            **fields,
        },
    )


# Vision towers


def _tower(config_class: str, patch_size: int, **fields: Any) -> PreTrainedConfig:
    return getattr(transformers, config_class)(
        **{
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": patch_size,
            **fields,
        }
    )


def _siglip(patch_size: int) -> PreTrainedConfig:
    return _tower("SiglipVisionConfig", patch_size, vision_use_head=False)


class _PatchesConfig(transformers.Gemma3nVisionConfig):
    """In place of the tower of Gemma 3n, which needs another library."""

    model_type = "patches"


class _Patches(PreTrainedModel):
    """One state for each square of 8 pixels, `[B, hidden size, 2, 2]`."""

    config_class = _PatchesConfig
    _supports_sdpa = True

    def __init__(self, config: _PatchesConfig):
        super().__init__(config)
        self.patch_embed = torch.nn.Conv2d(3, config.hidden_size, 8, 8)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patch_embed(pixel_values))


transformers.AutoModel.register(_PatchesConfig, _Patches, exist_ok=True)


# Pictures


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _fixed_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """One square of the tower's size: 4 tokens."""
    return Picture([IMAGE_TOKEN_ID] * 4, _noise(generator, 1, 3, IMAGE_SIZE, IMAGE_SIZE))


def _framed_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """One square of the tower's size between a start and an end token."""
    return Picture(
        [START_TOKEN_ID, *[IMAGE_TOKEN_ID] * 4, END_TOKEN_ID], _noise(generator, 1, 3, IMAGE_SIZE, IMAGE_SIZE)
    )


def _tiled_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """One or more squares of 4 tokens each."""
    num_tiles = (1, 3, 2)[number % 3]
    return Picture(
        [START_TOKEN_ID, *[IMAGE_TOKEN_ID] * (4 * num_tiles), END_TOKEN_ID],
        _noise(generator, num_tiles, 3, IMAGE_SIZE, IMAGE_SIZE),
    )


def _padded_tiles_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """Tiles of 4 tokens between separators. The image may fill only a part of its tiles."""
    num_tiles = (1, 3, 2)[number % 3]
    height, width = ((16, 16), (12, 16), (16, 8))[number % 3]
    pixels = _noise(generator, num_tiles, 3, IMAGE_SIZE, IMAGE_SIZE)
    pixels[..., height:, :] = 0.0
    pixels[..., width:] = 0.0
    return Picture([START_TOKEN_ID, *[IMAGE_TOKEN_ID] * 4] * num_tiles + [END_TOKEN_ID], pixels, (height, width))


def _collate_padded_tiles(rows: Rows) -> dict[str, Any]:
    most = max(sum(len(picture.pixels) for picture in row) for row in rows)
    pixel_values = torch.zeros(len(rows), most, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    mask = torch.zeros(len(rows), most, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for picture in row:
            end = start + len(picture.pixels)
            pixel_values[number, start:end] = picture.pixels
            mask[number, start:end, : picture.size[0], : picture.size[1]] = 1
            start = end
    return {"pixel_values": pixel_values, "pixel_attention_mask": mask}


_PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _anyres_image(generator: torch.Generator, number: int, num_images: int, patch: bool = True) -> Picture:
    """A small version of the image, then its tiles without padding and with a newline token after each row."""
    size = ((16, 32), (30, 14), (20, 32))[number % 3]
    per_side = 2  # patches per side of a tile
    if not patch:
        return Picture([IMAGE_TOKEN_ID] * (per_side**2 + 1), _noise(generator, 1, 1, 3, IMAGE_SIZE, IMAGE_SIZE), size)
    tiles_high, tiles_wide = get_anyres_image_grid_shape(size, _PINPOINTS, IMAGE_SIZE)
    _, rows, columns = unpad_image(torch.empty(1, tiles_high * per_side, tiles_wide * per_side), size).shape
    num_tiles = 1 + tiles_high * tiles_wide
    return Picture(
        [IMAGE_TOKEN_ID] * (per_side**2 + rows * (columns + 1)),
        _noise(generator, 1, num_tiles, 3, IMAGE_SIZE, IMAGE_SIZE),
        size,
    )


def _collate_anyres(rows: Rows) -> dict[str, Any]:
    pictures = [picture for row in rows for picture in row]
    most = max(picture.pixels.shape[1] for picture in pictures)
    pixel_values = torch.zeros(len(pictures), most, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    for number, picture in enumerate(pictures):
        pixel_values[number, : picture.pixels.shape[1]] = picture.pixels[0]
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor([picture.size for picture in pictures])}


def _onevision_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """LLaVA-OneVision cuts only an image that is alone into tiles."""
    return _anyres_image(generator, number, num_images, patch=num_images == 1)


def _collate_onevision(rows: Rows) -> dict[str, Any]:
    return {**_collate_anyres(rows), "batch_num_images": torch.tensor([len(row) for row in rows])}


def _onevision_video(generator: torch.Generator, number: int) -> Picture:
    """Three frames, each pooled to one token, and a newline."""
    return Picture([VIDEO_TOKEN_ID] * 4, _noise(generator, 1, 3, 3, IMAGE_SIZE, IMAGE_SIZE))


def _collate_onevision_videos(rows: Rows) -> dict[str, Any]:
    return {"pixel_values_videos": torch.cat([picture.pixels for row in rows for picture in row])}


def _pixtral_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """Rows of merged patches. A break token follows each row, an end token the last one."""
    height, width = ((16, 16), (8, 16), (16, 8))[number % 3]
    tokens = ([IMAGE_TOKEN_ID] * (width // 8) + [BREAK_TOKEN_ID]) * (height // 8)
    return Picture([*tokens[:-1], END_TOKEN_ID], _noise(generator, 3, height, width), (height, width))


def _collate_pixtral(rows: Rows) -> dict[str, Any]:
    pictures = [picture for row in rows for picture in row]
    height, width = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    pixel_values = torch.zeros(len(pictures), 3, height, width, dtype=torch.float64)
    for number, picture in enumerate(pictures):
        pixel_values[number, :, : picture.size[0], : picture.size[1]] = picture.pixels
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor([picture.size for picture in pictures])}


_MOST_TILES = 2


def _cross_attended_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """One placeholder for one or two tiles, which the tokens from there on read."""
    num_tiles = (1, 2)[number % 2]
    pixels = torch.zeros(1, _MOST_TILES, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    pixels[:, :num_tiles] = _noise(generator, 1, num_tiles, 3, IMAGE_SIZE, IMAGE_SIZE)
    return Picture([IMAGE_TOKEN_ID], pixels, (num_tiles,))


def _collate_cross_attended(rows: Rows) -> dict[str, Any]:
    most = max(map(len, rows))
    pixel_values = torch.zeros(len(rows), most, _MOST_TILES, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    ratios = torch.zeros(len(rows), most, dtype=torch.long)
    tiles = torch.zeros(len(rows), most, _MOST_TILES, dtype=torch.long)
    tiles[..., 0] = 1  # as the processor marks images that are not there
    for row, pictures in enumerate(rows):
        for number, picture in enumerate(pictures):
            (num_tiles,) = picture.size
            pixel_values[row, number] = picture.pixels[0]
            ratios[row, number] = num_tiles  # 1: one tile; 2: two tiles beside each other
            tiles[row, number, :num_tiles] = 1
    return {"pixel_values": pixel_values, "aspect_ratio_ids": ratios, "aspect_ratio_mask": tiles}


def _place_cross_attended(ids: torch.Tensor, rows: Rows) -> dict[str, Any]:
    """A token reads the tiles of the images before it, of several only the last one."""
    mask = torch.zeros(*ids.shape, max(map(len, rows)), _MOST_TILES, dtype=torch.long)
    for row, pictures in enumerate(rows):
        starts = [*(ids[row] == IMAGE_TOKEN_ID).nonzero()[:, 0].tolist(), ids.shape[1]]
        for number, picture in enumerate(pictures):
            mask[row, starts[number] : starts[number + 1], number, : picture.size[0]] = 1
    return {"cross_attention_mask": mask}


_GRID_PATCH_PIXELS = 3 * 2 * 4 * 4  # channels, frames per patch, height, width


def _grid_picture(generator: torch.Generator, token_id: int, grid: tuple[int, int, int]) -> Picture:
    frames, height, width = grid
    tokens = [START_TOKEN_ID, *[token_id] * (frames * height * width // 4), END_TOKEN_ID]
    return Picture(tokens, _noise(generator, frames * height * width, _GRID_PATCH_PIXELS), grid)


def _grid_image(generator: torch.Generator, number: int, num_images: int) -> Picture:
    """An image of its own size, with 2 x 2 patches per token."""
    return _grid_picture(generator, IMAGE_TOKEN_ID, ((1, 4, 4), (1, 4, 6), (1, 2, 4))[number % 3])


def _grid_video(generator: torch.Generator, number: int) -> Picture:
    return _grid_picture(generator, VIDEO_TOKEN_ID, ((2, 4, 4), (3, 2, 4))[number % 2])


def _timed_grid_video(generator: torch.Generator, number: int) -> Picture:
    """Qwen3-VL writes the time before each frame."""
    video = _grid_video(generator, number)
    frames, height, width = video.size
    frame = [START_TOKEN_ID, *[VIDEO_TOKEN_ID] * (height * width // 4), END_TOKEN_ID]
    video.tokens = [token for number in range(frames) for token in [FIRST_TEXT_TOKEN_ID + number, *frame]]
    return video


def _collate_grids(rows: Rows) -> dict[str, Any]:
    grids = torch.tensor([picture.size for row in rows for picture in row])
    return {**_stack(rows), "image_grid_thw": grids}


def _collate_grid_videos(rows: Rows) -> dict[str, Any]:
    inputs = _collate_grids(rows)
    return {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}


def _positioned_image(generator: torch.Generator, number: int, num_images: int, per_token: int) -> Picture:
    """An image of its own size, each of whose patches has a position. `per_token` patches become one token."""
    height, width = ((4, 4), (2, 4), (4, 2))[number % 3]
    tokens = [START_TOKEN_ID, *[IMAGE_TOKEN_ID] * (height * width // per_token), END_TOKEN_ID]
    return Picture(tokens, _noise(generator, height * width, 3 * 4 * 4), (height, width))


def _collate_positioned(rows: Rows) -> dict[str, Any]:
    pictures = [picture for row in rows for picture in row]
    most = max(len(picture.pixels) for picture in pictures)
    pixel_values = torch.zeros(len(pictures), most, pictures[0].pixels.shape[1], dtype=torch.float64)
    positions = torch.full((len(pictures), most, 2), -1)
    for number, picture in enumerate(pictures):
        pixel_values[number, : len(picture.pixels)] = picture.pixels
        height, width = picture.size
        positions[number, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)
    return {"pixel_values": pixel_values, "image_position_ids": positions}


# Families


def _multimodal(
    config_class: str, text_config: PreTrainedConfig, vision_config: PreTrainedConfig, **fields: Any
) -> PreTrainedConfig:
    return getattr(transformers, config_class)(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE_TOKEN_ID,
        tie_word_embeddings=False,
        **fields,
    )


def _qwen_vl(kind: str, **vision_fields: Any) -> Callable[[], PreTrainedConfig]:
    def config() -> PreTrainedConfig:
        text_fields = {"head_dim": 8} if kind == "Qwen3VL" else {}
        vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
        return _multimodal(
            f"{kind}Config",
            _decoder(f"{kind}TextConfig", rope_parameters=dict(_MROPE), **text_fields),
            getattr(transformers, f"{kind}Config")().vision_config.__class__(**vision, **vision_fields),
            video_token_id=VIDEO_TOKEN_ID,
            vision_start_token_id=START_TOKEN_ID,
            vision_end_token_id=END_TOKEN_ID,
        )

    return config


def _gemma4_vl(text_config: PreTrainedConfig) -> PreTrainedConfig:
    heads = {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 8, "pooling_kernel_size": 2}
    vision_config = _tower("Gemma4VisionConfig", 4, **heads)
    return _multimodal("Gemma4Config", text_config, vision_config, video_token_id=None, audio_token_id=None)


def _gemma4_unified() -> PreTrainedConfig:
    vision_config = transformers.Gemma4UnifiedVisionConfig(
        patch_size=2, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=8, output_proj_dims=16
    )
    text_config = _gemma4("Gemma4UnifiedTextConfig")
    return _multimodal("Gemma4UnifiedConfig", text_config, vision_config, video_token_id=None, audio_token_id=None)


def _gemma3n() -> PreTrainedConfig:
    # Tokens from `vocab_offset` on have embeddings of their own: the image token, and none for sounds.
    vision_config = _PatchesConfig(hidden_size=16, vocab_size=1, vocab_offset=IMAGE_TOKEN_ID)
    audio_config = transformers.Gemma3nAudioConfig(
        hidden_size=16,
        vocab_size=1,
        vocab_offset=VOCAB_SIZE,
        input_feat_size=8,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=(4, 4),
    )
    return _multimodal(
        "Gemma3nConfig",
        _gemma3n_text(vocab_size_per_layer_input=IMAGE_TOKEN_ID),
        vision_config,
        audio_config=audio_config,
        vision_soft_tokens_per_image=4,
        audio_token_id=VOCAB_SIZE,
    )


_GRIDS: dict[str, Any] = {
    "draw_image": _grid_image,
    "draw_video": _grid_video,
    "collate_images": _collate_grids,
    "collate_videos": _collate_grid_videos,
    "token_types": ("mm_token_type_ids", True),
}
_PADDED_TILES: dict[str, Any] = {"draw_image": _padded_tiles_image, "collate_images": _collate_padded_tiles}
_INDEXED: dict[str, Any] = {"float32_parts": True, "compiles": False}
_SCALED_EMBEDDING_STD = 2 * HIDDEN_SIZE**-0.5
_GEMMA4: dict[str, Any] = {
    "draw_image": functools.partial(_positioned_image, per_token=4),
    "collate_images": _collate_positioned,
    "token_types": ("mm_token_type_ids", True),
    "embedding_std": _SCALED_EMBEDDING_STD,
}

_REGISTRY = [
    Family("llama", "LlamaForCausalLM", _llama),
    Family("qwen2", "Qwen2ForCausalLM", _qwen2),
    Family("qwen3", "Qwen3ForCausalLM", _qwen3),
    Family("mistral", "MistralForCausalLM", _mistral),
    Family("llama4_text", "Llama4ForCausalLM", _llama4, float32_parts=True, compiles=False),
    Family("llama4_untuned", "Llama4ForCausalLM", lambda: _llama4(attn_temperature_tuning=False), float32_parts=True),
    Family("deepseek_v32", "DeepseekV32ForCausalLM", lambda: _deepseek("DeepseekV32Config"), **_INDEXED),
    Family(
        "glm_moe_dsa",
        "GlmMoeDsaForCausalLM",
        lambda: _deepseek("GlmMoeDsaConfig", indexer_types=["full", "shared", "full"]),
        **_INDEXED,
    ),
    Family("axk2", "AXK2ForCausalLM", lambda: _deepseek("AXK2Config"), **_INDEXED),
    Family("hy_v4", "HYV4ForCausalLM", lambda: _deepseek("HYV4Config"), attentions=("eager",), **_INDEXED),
    Family("gemma2", "Gemma2ForCausalLM", _gemma2, embedding_std=_SCALED_EMBEDDING_STD, attentions=("eager",)),
    Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, embedding_std=_SCALED_EMBEDDING_STD),
    Family("gemma4_text", "Gemma4ForCausalLM", _gemma4, embedding_std=_SCALED_EMBEDDING_STD),
    Family(
        "gemma4_moe",
        "Gemma4ForCausalLM",
        lambda: _gemma4(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16),
        embedding_std=_SCALED_EMBEDDING_STD,
    ),
    Family("gemma4_e_text", "Gemma4ForCausalLM", _gemma4_effective, embedding_std=_SCALED_EMBEDDING_STD),
    Family("gemma3n_text", "Gemma3nForCausalLM", _gemma3n_text, embedding_std=_SCALED_EMBEDDING_STD),
    Family(
        "llava",
        "LlavaForConditionalGeneration",
        lambda: _multimodal("LlavaConfig", _llama(), _tower("CLIPVisionConfig", 8), image_seq_length=4),
        _fixed_image,
    ),
    Family(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        lambda: _multimodal(
            "LlavaNextConfig",
            _mistral(sliding_window=None),
            _tower("CLIPVisionConfig", 8),
            image_grid_pinpoints=_PINPOINTS,
        ),
        _anyres_image,
        collate_images=_collate_anyres,
    ),
    Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        lambda: _multimodal(
            "LlavaOnevisionConfig",
            _qwen2(),
            _siglip(8),
            image_grid_pinpoints=_PINPOINTS,
            video_token_id=VIDEO_TOKEN_ID,
        ),
        _onevision_image,
        _onevision_video,
        collate_images=_collate_onevision,
        collate_videos=_collate_onevision_videos,
    ),
    Family(
        "vipllava",
        "VipLlavaForConditionalGeneration",
        lambda: _multimodal(
            "VipLlavaConfig",
            _llama(),
            _tower("CLIPVisionConfig", 8),
            vision_feature_layers=[-2, -1],
            image_seq_length=4,
        ),
        _fixed_image,
    ),
    Family(
        "internvl",
        "InternVLForConditionalGeneration",
        lambda: _multimodal("InternVLConfig", _qwen2(), _tower("InternVLVisionConfig", 4)),
        _tiled_image,
    ),
    Family(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        lambda: _multimodal("SmolVLMConfig", _llama(), _tower("SmolVLMVisionConfig", 4)),
        **_PADDED_TILES,
    ),
    Family(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        lambda: _multimodal("Idefics3Config", _llama(), _tower("Idefics3VisionConfig", 4)),
        **_PADDED_TILES,
    ),
    Family(
        "mllama",
        "MllamaForConditionalGeneration",
        lambda: transformers.MllamaConfig(
            text_config=_decoder(
                "MllamaTextConfig", num_hidden_layers=4, cross_attention_layers=[1, 3], bos_token_id=1
            ),
            vision_config=_tower(
                "MllamaVisionConfig",
                8,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=2,
                vision_output_dim=48,
                max_num_tiles=_MOST_TILES,
                intermediate_layers_indices=[0, 1],
                supported_aspect_ratios=[[1, 1], [1, 2]],
            ),
            image_token_index=IMAGE_TOKEN_ID,
        ),
        _cross_attended_image,
        collate_images=_collate_cross_attended,
        place_images=_place_cross_attended,
        compiles=False,
    ),
    Family(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        lambda: _multimodal("Mistral3Config", _mistral(sliding_window=None), _tower("PixtralVisionConfig", 4)),
        _pixtral_image,
        collate_images=_collate_pixtral,
    ),
    Family(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        lambda: _multimodal(
            "MistralLarge4Config", _deepseek("MistralLarge4TextConfig"), _tower("PixtralVisionConfig", 4)
        ),
        _pixtral_image,
        collate_images=_collate_pixtral,
        **_INDEXED,
    ),
    Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        _qwen_vl("Qwen2VL", embed_dim=16, hidden_size=HIDDEN_SIZE, mlp_ratio=1),
        **_GRIDS,
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        _qwen_vl(
            "Qwen2_5_VL",
            hidden_size=16,
            out_hidden_size=HIDDEN_SIZE,
            intermediate_size=16,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        **_GRIDS,
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        _qwen_vl(
            "Qwen3VL",
            hidden_size=16,
            out_hidden_size=HIDDEN_SIZE,
            intermediate_size=16,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
        **{**_GRIDS, "draw_video": _timed_grid_video},
    ),
    Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        lambda: _multimodal("Gemma3Config", _gemma3(), _siglip(4), mm_tokens_per_image=4),
        _framed_image,
        token_types=("token_type_ids", True),
        embedding_std=_SCALED_EMBEDDING_STD,
    ),
    Family("gemma4", "Gemma4ForConditionalGeneration", lambda: _gemma4_vl(_gemma4()), **_GEMMA4),
    Family("gemma4_e", "Gemma4ForConditionalGeneration", lambda: _gemma4_vl(_gemma4_effective()), **_GEMMA4),
    Family(
        "gemma4_unified",
        "Gemma4UnifiedForConditionalGeneration",
        _gemma4_unified,
        **{**_GEMMA4, "draw_image": functools.partial(_positioned_image, per_token=1)},
    ),
    Family("gemma3n", "Gemma3nForConditionalGeneration", _gemma3n, _framed_image, embedding_std=_SCALED_EMBEDDING_STD),
    Family(
        "aya_vision",
        "AyaVisionForConditionalGeneration",
        lambda: _multimodal(
            "AyaVisionConfig",
            _decoder("Cohere2Config", sliding_window=WINDOW, layer_types=list(_ALTERNATING)),
            _siglip(4),
        ),
        _tiled_image,
    ),
    Family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        lambda: _multimodal("PaliGemmaConfig", _gemma(), _siglip(8), projection_dim=HIDDEN_SIZE),
        _fixed_image,
        token_types=("token_type_ids", False),
        embedding_std=_SCALED_EMBEDDING_STD,
        eager_left_padding=True,
    ),
    Family(
        "paligemma2",
        "PaliGemmaForConditionalGeneration",
        lambda: _multimodal("PaliGemmaConfig", _gemma2(), _siglip(8), projection_dim=HIDDEN_SIZE),
        _fixed_image,
        token_types=("token_type_ids", False),
        embedding_std=_SCALED_EMBEDDING_STD,
        attentions=("eager",),
        eager_left_padding=True,
    ),
]
# Older releases of transformers lack some, and have some whose indexer keeps its keys in the module.
_HAS_INDEXED = hasattr(transformers.cache_utils, "DynamicIndexedLayer")
FAMILIES = {
    family.name: family
    for family in _REGISTRY
    if hasattr(transformers, family.model_class) and (_HAS_INDEXED or family.name not in ("glm_moe_dsa",))
}
