"""CLIP through open_clip: how well a picture and a text fit, with weights that the user names (docs/pictures.md).

Legend: B pictures or texts, D width of a feature, H, W pixels, S side in pixels, T tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ofa_ds.vision.clip_files import HEAD_WIDTH, ClipSizes, read_clip
from ofa_ds.vision.libraries import library
from ofa_ds.vision.weights import check_weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

BATCH = 64
"""Pictures or texts that go through the model at once."""

_BEGIN, _END = 49406, 49407
_SPECIAL = {"<|startoftext|>": _BEGIN, "<|endoftext|>": _END}
_WORDS = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MAX_WORD = 1000
"""Characters of one word that are looked at: merging takes the square of their number."""


class Clip:
    """Features are of length 1, float32, on the CPU, and without gradient."""

    def __init__(self, model: Any, device: str | torch.device = "cpu") -> None:
        """model: an `open_clip.CLIP` in evaluation mode."""
        self.model = model.to(device)
        self.device = torch.device(device)
        self.side: int = model.visual.image_size[0]
        self.context_length: int = model.context_length

    def image_features(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 RGB pictures [H, W, 3] of any sizes -> [B, D]."""
        return self._features(images, lambda part: torch.stack([to_pixels(each, self.side) for each in part]), "image")

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """[B, D]. Texts are cut to the context, as with `truncate` in OpenAI's code."""
        return self._features(texts, lambda part: tokenize(part, context_length=self.context_length), "text")

    def scores(self, images: Sequence[np.ndarray], text: str) -> Tensor:
        """Cosine of each picture and the text, -1 ... 1: [B]."""
        return self.image_features(images) @ self.text_features([text])[0]

    def _features(self, values: Sequence[Any], prepare: Any, kind: str) -> Tensor:
        dtype = self.model.logit_scale.dtype
        encode = getattr(self.model, f"encode_{kind}")
        parts = []
        with torch.no_grad():
            for start in range(0, len(values), BATCH):
                inputs = prepare(values[start : start + BATCH]).to(self.device, dtype if kind == "image" else None)
                parts.append(encode(inputs, normalize=True).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.model.text_projection.shape[1])


def load_clip(path: str | Path, device: str | torch.device = "cpu") -> Clip:
    """OpenAI's file, Hugging Face's folder, or open_clip's safetensors; in fp32. Nothing is downloaded.

    Raises ValueError, one line: open_clip is not installed; no CLIP there, names or shapes of another model, values
    that are not finite.
    """
    library("open_clip", "CLIP's scores")
    file, sizes, weights = read_clip(Path(path))
    model = new_model(sizes)
    check_weights(file, model, weights, "a ViT CLIP of the sizes that its other weights have")
    model.load_state_dict(weights)
    return Clip(model.eval().requires_grad_(False), device)


def new_model(sizes: ClipSizes) -> Any:
    """An `open_clip.CLIP` whose weights are to be loaded; the global generator is left as it was."""
    open_clip = library("open_clip", "CLIP's scores")
    vision = open_clip.CLIPVisionCfg(
        layers=sizes.vision_layers, width=sizes.vision_width, head_width=HEAD_WIDTH, patch_size=sizes.patch_size,
        image_size=sizes.image_size,
    )  # fmt: skip
    text = open_clip.CLIPTextCfg(
        context_length=sizes.context_length, vocab_size=sizes.vocab_size, width=sizes.text_width,
        heads=sizes.text_width // HEAD_WIDTH, layers=sizes.text_layers,
    )  # fmt: skip
    with torch.random.fork_rng(devices=()):
        return open_clip.CLIP(sizes.embed_dim, vision, text, quick_gelu=sizes.quick_gelu)


def to_pixels(image_HW3: np.ndarray, side: int) -> Tensor:
    """uint8 RGB [H, W, 3] -> float32 [3, S, S]: shorter side resized (bicubic), the middle cut out, standardised.

    Raises ValueError for anything but such a picture.
    """
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3 or not image_HW3.size:
        raise ValueError(f"CLIP: want pictures uint8 [H, W, 3], got {image_HW3.dtype} {list(image_HW3.shape)}")
    height, width = image_HW3.shape[:2]
    if height < width:
        height, width = side, int(side * width / height)
    else:
        height, width = int(side * height / width), side
    image = Image.fromarray(np.ascontiguousarray(image_HW3))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - side) / 2), round((width - side) / 2)
    pixels = np.array(image.crop((left, top, left + side, top + side)), np.float32).transpose(2, 0, 1) / np.float32(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (torch.from_numpy(pixels) - mean) / std


@functools.cache
def _tokenizer() -> Any:
    """open_clip's, in which OpenAI's special tokens are special, as they are in OpenAI's code."""
    library("open_clip", "CLIP's scores")
    import regex
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    for name in ("<start_of_text>", "<end_of_text>"):
        del tokenizer.encoder[name], tokenizer.cache[name]
    tokenizer.encoder |= _SPECIAL
    tokenizer.decoder |= {number: name for name, number in _SPECIAL.items()}
    tokenizer.cache |= {name: name for name in _SPECIAL}
    tokenizer.pat = regex.compile("|".join(map(re.escape, _SPECIAL)) + _WORDS, regex.IGNORECASE)
    return tokenizer


def encode(text: str) -> list[int]:
    """Ids of a text, without the tokens that begin and end it."""
    words = (word[:_MAX_WORD] for word in text.split())
    return _tokenizer().encode(" ".join(words))


def tokenize(texts: Sequence[str], *, context_length: int = 77, truncate: bool = True) -> Tensor:
    """int64 [B, T]: begin, ids, end, zeros. Raises ValueError for a text that is too long, unless it is cut."""
    result_BT = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row_T, text in zip(result_BT, texts, strict=True):
        ids = [_BEGIN, *encode(text), _END]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(f"CLIP: {text[:60]!r} has {len(ids)} tokens, the context {context_length}; shorten it")
            ids = [*ids[: context_length - 1], _END]
        row_T[: len(ids)] = torch.tensor(ids)
    return result_BT


def without_slashes(caption: str) -> str:
    """What CLIP reads of a caption, as in the original."""
    return caption.replace("/", "")


def rerank(
    clip: Clip, images: Sequence[np.ndarray], *, caption: str | None = None, reference: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """(scores, numbers of the pictures), best first and equals in their order: by a caption, or by a picture.

    Raises ValueError unless exactly one of the two is given.
    """
    if (caption is None) == (reference is None):
        raise ValueError("CLIP: want a caption or a reference picture to rank by, and not both")
    scores = clip.scores(images, caption) if reference is None else _likeness(clip, images, reference)
    return torch.sort(scores, descending=True, stable=True)


def _likeness(clip: Clip, images: Sequence[np.ndarray], reference: np.ndarray) -> Tensor:
    return clip.image_features(images) @ clip.image_features([reference])[0]
