"""Tiny random models of every family that casa knows, and the ways to hand a text with pictures to them.

Models are in float64 unless asked otherwise; most have three blocks and 61 tokens. Pictures of `TinySample` fit all of
them but SmolVLM, whose tower takes squares of 16 patches (`in_squares`).
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa.models import CasaForConditionalGeneration, CasaProcessor, FusionConfig, adapt

VOCABULARY = 61
SIZES = ((56, 84), (28, 28), (84, 56))  # height and width of pictures of noise in px, in turn
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TOWER = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 1}
_QWEN_TOWER = _TOWER | {"out_hidden_size": 32, "intermediate_size": 24}
_MARKS = {"image_token_id": 58, "video_token_id": 59, "vision_start_token_id": 56, "vision_end_token_id": 57}


def _text(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_config(getattr(transformers, name)(**(_TEXT | changes)))


def _vlm(name: str, text: dict[str, Any], tower: dict[str, Any], **top: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, name)(
            text_config=_TEXT | text, vision_config=tower, tie_word_embeddings=False, **top
        )
        return AutoModelForImageTextToText.from_config(config)

    return build


def _qwen_vl(name: str, tower: dict[str, Any]) -> Callable[[], Any]:
    return _vlm(name, {"rope_parameters": _MROPE}, tower, **_MARKS)


TEXT_BACKBONES: dict[str, Callable[[], Any]] = {
    "llama": _text("LlamaConfig"),
    "mistral": _text("MistralConfig", sliding_window=None),
    "qwen2": _text("Qwen2Config"),
    "qwen3": _text("Qwen3Config"),
    "smollm3": _text("SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "helium": _text("HeliumConfig"),
    "gemma3_text": _text(
        "Gemma3TextConfig",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=64,
        query_pre_attn_scalar=16,
    ),
}

VLM_BACKBONES: dict[str, Callable[[], Any]] = {
    "qwen2_vl": _qwen_vl("Qwen2VLConfig", _TOWER | {"embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": _qwen_vl("Qwen2_5_VLConfig", _QWEN_TOWER | {"fullatt_block_indexes": [1]}),
    "qwen3_vl": _qwen_vl(
        "Qwen3VLConfig", _QWEN_TOWER | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    ),
    "smolvlm": _vlm(
        "SmolVLMConfig",
        {"model_type": "llama"},
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_id=58,
        scale_factor=2,
    ),
}

BACKBONES = TEXT_BACKBONES | VLM_BACKBONES


def tiny_text_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    """A Llama of a few thousand parameters, with grouped-query attention."""
    values: dict[str, Any] = _TEXT | {"head_dim": None} | changes
    torch.manual_seed(seed)
    return spread(LlamaForCausalLM(LlamaConfig(**values))).to(dtype)


def tiny_encoder(seed: int = 1, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """A Qwen2.5-VL image tower of two blocks, 28 px per token."""
    values: dict[str, Any] = _QWEN_TOWER | {"out_hidden_size": 24, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLVisionConfig(**(values | changes))
    torch.manual_seed(seed)
    return spread(Qwen2_5_VisionTransformerPretrainedModel._from_config(config)).to(dtype)


def tiny_casa(seed: int = 0, dtype: torch.dtype = torch.float64, **fusion: Any) -> CasaForConditionalGeneration:
    """A fused model whose image side matters: no weight is near zero."""
    model = adapt(tiny_text_model(seed, dtype), FusionConfig(**fusion), vision=tiny_encoder(seed + 1, dtype))
    torch.manual_seed(seed + 2)
    spread(model.projector)
    for parameter in model.casa_layers.parameters():
        if parameter.numel() == 1:  # a gate that starts closed would hide the layer
            torch.nn.init.constant_(parameter, 0.7)
    return model.eval()


def tiny_speaker(**fusion: Any) -> CasaForConditionalGeneration:
    """`tiny_casa` whose captions differ in length, some of them empty: its stop token comes up now and then."""
    model = tiny_casa(**fusion)
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight[2] = head.weight[3:].mean(0) * 3
    model.generation_config.eos_token_id = 2
    return model


def tiny_backbone(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model of a family, with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    return spread(BACKBONES[kind]()).to(dtype).eval()


def tiny_casa_over(kind: str, seed: int = 0, **fusion: Any) -> CasaForConditionalGeneration:
    """The same, fused in float64; text-only models with a Qwen2.5-VL tower. All of it can be trained."""
    vision = tiny_encoder(seed + 1) if kind in TEXT_BACKBONES else None
    model = adapt(tiny_backbone(kind, seed), FusionConfig(**fusion), vision=vision)
    torch.manual_seed(seed + 2)
    for name in ("projector", "compressor", "gist"):
        if (part := getattr(model, name, None)) is not None:
            spread(part)
    return model.eval().requires_grad_(True)


def tiny_images(
    grids: list[tuple[int, int]], seed: int = 3, dtype: torch.dtype = torch.float64, squares: bool = False
) -> dict[str, Any]:
    """`pixel_values` and `image_grid_thw` of random pictures of (rows, columns) tokens each.

    Args:
        squares: As (n, 3, 56, 56) instead of patches, for a tower of one size; every picture then has 2 x 2 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    patches = sum(4 * rows * columns for rows, columns in grids)
    shape = (patches // 16, 3, 56, 56) if squares else (patches, 3 * 14 * 14)
    return {
        "pixel_values": torch.randn(shape, generator=generator, dtype=dtype),
        "image_grid_thw": torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in grids]),
    }


@dataclass(frozen=True)
class TinySample:
    """A text with pictures: token ids, and (index of the token before which it stands, rows, columns) of each.

    Rows and columns count tokens. The same sample has the same pixels however it is handed to a model.

    Attributes:
        squares: See `tiny_images`.
    """

    ids: tuple[int, ...]
    pictures: tuple[tuple[int, int, int], ...] = ()
    seed: int = 3
    squares: bool = False

    def in_squares(self) -> "TinySample":
        """The same text with every picture a square of 2 x 2 tokens, as a tower of one size takes it."""
        return replace(self, pictures=tuple((place, 2, 2) for place, _, _ in self.pictures), squares=True)

    @property
    def image_tokens(self) -> int:
        return sum(rows * columns for _, rows, columns in self.pictures)

    def inputs(self) -> dict[str, Any]:
        """One unpadded row."""
        return as_batch([self])

    def calls(self, cuts: Sequence[int], late: bool = False) -> list[dict[str, Any]]:
        """The row in several calls, cut at text indices; a picture at a cut ends one or, if `late`, opens the next."""
        found = []
        pixels = _pixels(self)
        left = list(enumerate(self.pictures))
        borders = [0, *cuts, len(self.ids)]
        for number, (first, stop) in enumerate(pairwise(borders)):
            last = number == len(borders) - 2
            mine = [(n, p[0] - first) for n, p in left if p[0] < stop or (p[0] == stop and (last or not late))]
            left = left[len(mine) :]
            call: dict[str, Any] = {"input_ids": torch.tensor([self.ids[first:stop]])}
            if mine:
                call |= {key: torch.cat([pixels[n][key] for n, _ in mine]) for key in pixels[0]}
                call["image_positions"] = torch.tensor([(0, index) for _, index in mine])
            found.append(call)
        return found


def as_batch(samples: Sequence[TinySample]) -> dict[str, Any]:
    """Rows padded on the left, as the processor makes them; `attention_mask` only where there is padding."""
    length = max(len(sample.ids) for sample in samples)
    empty = [length - len(sample.ids) for sample in samples]
    rows = [[0] * n + list(sample.ids) for n, sample in zip(empty, samples, strict=True)]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(rows)}
    if any(empty):
        inputs["attention_mask"] = torch.tensor([[0] * n + [1] * (length - n) for n in empty])
    places = [(row, empty[row] + p[0]) for row, sample in enumerate(samples) for p in sample.pictures]
    return inputs | _pictures(samples, places)


def as_packed(samples: Sequence[TinySample]) -> dict[str, Any]:
    """All samples in one row; positions restart at each."""
    places, offset = [], 0
    for sample in samples:
        places += [(0, offset + p[0]) for p in sample.pictures]
        offset += len(sample.ids)
    return {
        "input_ids": torch.tensor([[token for sample in samples for token in sample.ids]]),
        "position_ids": torch.tensor([[index for sample in samples for index in range(len(sample.ids))]]),
        "use_cache": False,
    } | _pictures(samples, places)


def _pictures(samples: Sequence[TinySample], places: list[tuple[int, int]]) -> dict[str, Any]:
    if not places:
        return {}
    each = [images for sample in samples for images in _pixels(sample)]
    joined = {key: torch.cat([images[key] for images in each]) for key in each[0]}
    return joined | {"image_positions": torch.tensor(places)}


def _pixels(sample: TinySample) -> list[dict[str, Any]]:
    """Every picture by itself."""
    return [
        tiny_images([(rows, columns)], sample.seed + number, squares=sample.squares)
        for number, (_, rows, columns) in enumerate(sample.pictures)
    ]


SPECIAL = ("<pad>", "<bos>", "<end>", "<user>", "<assistant>", "<image>", "<frame>")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image><frame>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_image_processor() -> Qwen2VLImageProcessorPil:
    """28 px per token, 1 to 64 tokens a picture."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}
    return Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=1, merge_size=2, size=size)


def tiny_processor(delimited: bool = True) -> CasaProcessor:
    """One token per letter, digit or blank; with a delimiter behind each image, or without."""
    letters = [*"0123456789abcdefghijklmnopqrstuvwxyz .?ABCDEFGHIJKLMN"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.add_special_tokens({"additional_special_tokens": [*SPECIAL[3:]]})
    template = TEMPLATE if delimited else TEMPLATE.replace("<frame>", "")
    suffix = "<frame>" if delimited else ""
    return CasaProcessor(
        tiny_image_processor(), fast, chat_template=template, frame_suffix=suffix, stream_prompt="say it"
    )


def tiny_checkpoint(folder: Path, **fusion: Any) -> Path:
    """A folder with a fused model (float32) and its processor, as `casa` takes one."""
    model = tiny_casa(dtype=torch.float32, **fusion)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def spread(module: torch.nn.Module) -> Any:
    """Random weights large enough that every part of a tiny model changes its output; norms near one."""
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 / parameter[0].numel() ** 0.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def noise_frames(seed: int, count: int) -> list[np.ndarray]:
    """`count` frames of noise, uint8 (H, W, 3), of three sizes; which one comes first hangs on the seed."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 255, (*SIZES[(seed + n) % 3], 3), dtype=np.uint8) for n in range(count)]


def claimed_png(width: int, height: int) -> bytes:
    """A PNG that claims a size in px, and of whose pixels hardly any are there."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + _chunk(b"IDAT", zlib.compress(bytes(100)))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
