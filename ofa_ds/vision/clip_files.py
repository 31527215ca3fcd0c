"""CLIP's weights on disk: OpenAI's file, Hugging Face's folder, open_clip's safetensors; under OpenAI's names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.convert.torch_file import TorchFile
from ofa_ds.convert.torchscript_file import is_torchscript, read_torchscript
from ofa_ds.vision.weights import read_safetensors

HEAD_WIDTH = 64
"""Of every head of OpenAI's models."""

_IN_FOLDER = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_CONFIG, _HUGGING_FACE_CONFIG = "open_clip_config.json", "config.json"
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Beside the weights in OpenAI's archive and in old files of open_clip."""
_WANTED = "want OpenAI's ViT-B-16.pt, open_clip's safetensors, or a folder with one of " + ", ".join(_IN_FOLDER)

_TOWERS = {"vision_model.": "visual.", "text_model.": ""}
_HUGGING_FACE = {
    "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
"""Part of a name of Hugging Face's CLIP, after its tower -> what OpenAI calls it."""
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_SEPARATE = re.compile(r"(.*)self_attn\.q_proj\.(weight|bias)")


@dataclass(frozen=True, kw_only=True)
class ClipSizes:
    """Of a ViT CLIP, as its weights have them."""

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int
    quick_gelu: bool = True
    """x sigmoid(1.702 x), which OpenAI's models were trained with; weights do not tell."""


def read_clip(path: Path) -> tuple[Path, ClipSizes, dict[str, Tensor]]:
    """(file, sizes, weights in fp32). Nothing of a file is run, nothing is downloaded.

    Raises ValueError, one line with the file: none there, damaged, code in its pickle, or no ViT CLIP.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in _IN_FOLDER if (path / name).is_file()), path)
    if not file.is_file():
        raise ValueError(f"{path}: no CLIP there: {_WANTED}")
    found = _tensors_of(file)
    if any(name.startswith("vision_model.") for name in found):
        quick_gelu = _quick_gelu_of_hugging_face(file.parent / _HUGGING_FACE_CONFIG)
        found = _from_hugging_face(file, found)
    else:
        quick_gelu = _quick_gelu_of_open_clip(file.parent / _OPEN_CLIP_CONFIG)
    weights = {name: value.float() for name, value in found.items() if name not in _NO_WEIGHTS}
    return file, _sizes(file, weights, quick_gelu=quick_gelu), weights


def _tensors_of(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if is_torchscript(file):
        return read_torchscript(file)
    found = TorchFile(file).content
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{file}: want a state dict of tensors; {_WANTED}")
    return dict(found)


def _from_hugging_face(file: Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and layouts of OpenAI: query, key and value are one matrix, projections are the other way round."""
    result = {}
    for name, value in found.items():
        if name in _TRANSPOSED:
            result[_TRANSPOSED[name]] = value.T.contiguous()
        elif separate := _SEPARATE.fullmatch(name):
            parts = [found.get(f"{separate[1]}self_attn.{part}_proj.{separate[2]}") for part in "qkv"]
            if any(part is None or part.shape != value.shape for part in parts):
                raise ValueError(f"{file}: {name}: k_proj and v_proj of the same shape are not there")
            result[f"{_openai_name(separate[1])}attn.in_proj_{separate[2]}"] = torch.cat(parts)
        elif not name.endswith(("position_ids", ".k_proj.weight", ".k_proj.bias", ".v_proj.weight", ".v_proj.bias")):
            result[_openai_name(name)] = value
    return result


def _openai_name(name: str) -> str:
    for tower, theirs in _TOWERS.items():
        if name.startswith(tower):
            name = name.removeprefix(tower)
            for part, other in _HUGGING_FACE.items():
                name = name.replace(part, other)
            return theirs + name
    return name


def _quick_gelu_of_hugging_face(config: Path) -> bool:
    """As `config.json` beside the weights says; OpenAI's, which is Hugging Face's default, where there is none."""
    towers = [_table(config).get(f"{tower}_config") or {} for tower in ("vision", "text")]
    defaults = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    found = [{key: tower.get(key, default) for key, default in defaults.items()} for tower in towers]
    for tower in towers:
        heads, width = tower.get("num_attention_heads"), tower.get("hidden_size")
        if heads and width and heads * HEAD_WIDTH != width:
            raise ValueError(f"{config}: {heads} heads of a width of {width}: want heads of {HEAD_WIDTH}, as OpenAI's")
    if (
        found[0] != found[1]
        or found[0]["hidden_act"] not in ("quick_gelu", "gelu")
        or found[0]["layer_norm_eps"] != 1e-5
    ):
        raise ValueError(f"{config}: want quick_gelu or gelu in both towers and layer_norm_eps 1e-5, got {found}")
    return found[0]["hidden_act"] == "quick_gelu"


def _quick_gelu_of_open_clip(config: Path) -> bool:
    """As `open_clip_config.json` beside the weights says; OpenAI's where there is none."""
    if not config.is_file():
        return True
    model = _table(config).get("model_cfg")
    if not isinstance(model, dict):
        raise ValueError(f"{config}: want a table model_cfg")
    return bool(model.get("quick_gelu", False))


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: want a table, got {type(found).__name__}")
    return found


def _sizes(file: Path, weights: Mapping[str, Tensor], *, quick_gelu: bool) -> ClipSizes:
    """From the shapes. Raises ValueError where a weight that tells a size is missing or of another rank."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != rank:
            raise ValueError(f"{file}: {name}: want a tensor of {rank} dimensions, as a ViT CLIP has it; {_WANTED}")
        return tuple(weights[name].shape)

    def layers(tower: str) -> int:
        return len({name for name in weights if re.fullmatch(rf"{tower}transformer\.resblocks\.\d+\.ln_1\.bias", name)})

    vision_width, _, patch_size, _ = shape("visual.conv1.weight", 4)
    num_positions, _ = shape("visual.positional_embedding", 2)
    context_length, text_width = shape("positional_embedding", 2)
    for width in (vision_width, text_width):
        if width % HEAD_WIDTH:
            raise ValueError(
                f"{file}: want widths that are multiples of {HEAD_WIDTH}, the width of a head, got {width}"
            )
    return ClipSizes(
        embed_dim=shape("text_projection", 2)[1],
        image_size=round((num_positions - 1) ** 0.5) * patch_size,
        patch_size=patch_size, vision_width=vision_width, vision_layers=layers(r"visual\."),
        context_length=context_length, vocab_size=shape("token_embedding.weight", 2)[0], text_width=text_width,
        text_layers=layers(""), quick_gelu=quick_gelu,
    )  # fmt: skip
