"""A trained model as evaluation and generation use it: weights, vocabulary and settings of one checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ofa_ds.batch import Batch, pack
from ofa_ds.checkpoint.loading import load_model_weights
from ofa_ds.checkpoint.manifest import Manifest, read_manifest
from ofa_ds.checkpoint.runs import find
from ofa_ds.config import Recipe, recipe_from_dict
from ofa_ds.data import kept_vocabulary
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.model.running import implementations
from ofa_ds.tasks.context import PIXELS_PER_CODE, Context, PaintCodes
from ofa_ds.tasks.task import context_of
from ofa_ds.terms import PAD_ID

Precision = Literal["auto", "bf16", "fp32"]
"""auto: bf16 on a GPU that has it, fp32 elsewhere."""

EMBEDDING = "encoder.embed_tokens.weight"
"""A row per entry of the vocabulary."""

MAX_TOKENS_A_BATCH = 8192
"""Encoder and decoder tokens of the examples that go through the model together, about."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode and all it needs to be asked something."""

    model: OFA
    vocab: Vocab
    recipe: Recipe
    path: str = ""
    step: int = 0
    paint: PaintCodes | None = None
    """Where a VQGAN is at hand for what people look at."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def describe(self) -> str:
        """One line: what computes the answers."""
        return implementations(self.model, self.model.config, training=False)

    def context(self, shards: Shards | None = None) -> Context:
        """No augmentation, no patch sampling: what is asked is the same every time. shards: those that are asked."""
        config = self.model.config
        return context_of(
            shards, self.vocab, self.recipe.data, patch_size=config.patch_size, max_positions=config.max_positions,
            split="heldout", paint=self.paint,
        )  # fmt: skip

    def pack(self, examples: Sequence[Example]) -> Batch:
        """One batch; pictures of any size, as many groups as there are sizes. Of texts alone no image module runs."""
        config = self.model.config
        sizes = [example.image.shape[:2] for example in examples if example.image is not None]
        return pack(examples, sizes, config.patch_size, config.image_bucket_size).to(self.device)


def load_model(
    checkpoint: str | Path,
    device: str | torch.device | None = None,
    *,
    average: bool = False,
    vocab: Path | None = None,
    precision: Precision = "auto",
) -> LoadedModel:
    """The model of a checkpoint, or of the newest one of a run directory, with the recipe that was saved with it.

    device: the first GPU where there is one, unless given. average: take the moving average of its weights. vocab: the
    vocabulary's directory, where neither the run keeps it nor the recipe's path leads there. precision: as in
    `dtype_for`.
    Raises ValueError: no checkpoint, no average in it, or no vocabulary that is the one the model was trained with.
    """
    directory = find(checkpoint)
    manifest = read_manifest(directory)
    if manifest.recipe is None:
        raise ValueError(f"{directory}: holds no recipe; it was not saved by `ofa-ds pretrain` or made by an import")
    recipe = recipe_from_dict(manifest.recipe)
    words = _vocabulary(directory, manifest, recipe, vocab)
    settings = dataclasses.replace(model_config(recipe, words.size), activation_checkpointing=False)
    model = OFA(settings)
    weights = load_model_weights(directory, average=average)
    if name := first_not_finite(weights):
        print(f"{directory}: {name} holds NaN or infinite values, so that answers mean nothing", file=sys.stderr)
    model.load_state_dict(weights)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = model.to(dtype_for(precision, device)).to(device)
    return LoadedModel(model=model.eval(), vocab=words, recipe=recipe, path=str(directory), step=manifest.step)


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """What a model that answers on `device` computes in. Raises ValueError for what is no precision."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r}: want one of {', '.join(get_args(Precision))}")
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "bf16" or precision == "auto" and has_bf16 else torch.float32


def first_not_finite(weights: Mapping[str, Tensor]) -> str:
    """Name of the first tensor with NaN or an infinite value; empty where there is none."""
    return next((name for name, tensor in weights.items() if not bool(tensor.isfinite().all())), "")


def _vocabulary(directory: Path, manifest: Manifest, recipe: Recipe, given: Path | None) -> Vocab:
    """Raises ValueError: there is none, or its ids are not the model's."""
    fingerprint = manifest.identity.get("vocab")
    found = kept_vocabulary.find(directory, fingerprint=fingerprint, recipe_path=recipe.data.vocab, given=given)
    if found is None:
        raise ValueError(f"{directory}: came without a vocabulary; give the model's: --vocab DIR")
    path, vocab = found
    rows = manifest.tensors[EMBEDDING].shape[0] if EMBEDDING in manifest.tensors else vocab.size
    if vocab.size != rows:
        raise ValueError(f"{path}: a vocabulary of {vocab.size} entries, the model of {directory} has {rows}")
    return vocab


def batches(examples: Sequence[Example], patch_size: int, answer_tokens: int = 0) -> Iterator[list[Example]]:
    """The examples in order, cut so that each part has about MAX_TOKENS_A_BATCH tokens; none is empty.

    answer_tokens: of what is generated for an example, where that is known to be more than its target.
    """
    part: list[Example] = []
    tokens = 0
    for example in examples:
        size = len(example.source) + max(len(example.target), answer_tokens)
        if example.image is not None:
            size += (example.image.shape[0] // patch_size) * (example.image.shape[1] // patch_size)
        if part and tokens + size > MAX_TOKENS_A_BATCH:
            yield part
            part, tokens = [], 0
        part.append(example)
        tokens += size
    if part:
        yield part


Told = Callable[[int], object]
"""Called with the number of examples that are done."""


def untold(count: int) -> None:
    """Nobody waits for it."""


@torch.no_grad()
def token_sums(loaded: LoadedModel, examples: Sequence[Example], told: Told = untold) -> list[float]:
    """[sum of the negative log-likelihoods (nats), number right, number] of the target tokens, each after those before
    it as they should be."""
    sums = torch.zeros(3, dtype=torch.float64)
    for part in batches(examples, loaded.model.config.patch_size):
        batch = loaded.pack(part)
        _, nll_M, correct_M = loaded.model(batch)
        counted_M = batch.targets != PAD_ID
        parts: list[Tensor] = [nll_M[counted_M].sum(), correct_M[counted_M].sum(), counted_M.sum()]
        sums += torch.tensor([float(value) for value in parts], dtype=torch.float64)
        told(len(part))
    return sums.tolist()


def generated(
    loaded: LoadedModel, examples: Sequence[Example], *, beam: int = 1, max_tokens: int | None = None,
    told: Told = untold,
) -> list[list[int]]:  # fmt: skip
    """Token ids that the model gives for each example, without bos and eos; all examples of one task.

    max_tokens: where generation is cut off; half as much again as the longest expected answer, where not given. Image
    codes come in exactly the number that the picture has room for.
    """
    vocab, num_codes = loaded.vocab, (loaded.recipe.data.code_image_size // PIXELS_PER_CODE) ** 2
    limit = max_tokens or max((len(example.target) for example in examples), default=1) * 3 // 2 + 8
    config = GenerationConfig(beams=beam, max_len_b=min(limit, loaded.model.config.max_positions))
    if examples and examples[0].code:
        codes = (vocab.code_start, vocab.bin_start)
        config = GenerationConfig(beams=beam, max_len_b=num_codes, gen_code=True, constraint_range=codes)
    answers: list[list[int]] = []
    for part in batches(examples, loaded.model.config.patch_size):
        found = generate(loaded.model, loaded.pack(part), config)
        answers += [hypotheses[0].tokens[:-1] if hypotheses else [] for hypotheses in found]
        told(len(part))
    return answers
