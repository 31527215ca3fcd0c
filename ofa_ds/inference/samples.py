"""Text to image as a user asks for it: samples of codes with their seeds, painted, ranked, and on one sheet."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ofa_ds.inference.answering import MAX_TOGETHER, codes_config
from ofa_ds.inference.asking import AS_THE_TASK_SAYS, How, asked_as
from ofa_ds.inference.draws import SeededDraw
from ofa_ds.inference.generate import generate
from ofa_ds.inference.loaded_model import LoadedModel, load_model
from ofa_ds.inference.painting import check_codes, coder_of
from ofa_ds.storage.atomic import new_content, replace_file
from ofa_ds.tasks.gallery import Entry, draw_gallery
from ofa_ds.tasks.task import ask
from ofa_ds.vision.clip import Clip, load_clip, rerank, without_slashes
from ofa_ds.vision.coder import Coder
from ofa_ds.vision.scenes_coder import ScenesCoder

NAME = "text_to_image"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    samples: int = 24
    top_k: int = 256
    """0 for all codes."""
    top_p: float = 0.0
    """In place of top_k: the most probable codes that together reach this probability; 0 for no limit."""
    temperature: float = 1.0
    seed: int = 0
    """Of the first sample; those after it have the numbers that follow."""


class Sample(NamedTuple):
    seed: int
    codes: list[int]
    """Of the code book, row by row."""
    log_probability: float
    """Mean over the codes, in nats, among all codes."""
    similarity: float | None = None
    """CLIP's cosine of picture and caption, where it was asked."""


def sample_codes(loaded: LoadedModel, caption: str, sampling: Sampling) -> list[Sample]:
    """By their seeds: the most probable are the emptiest. One is the same whatever is sampled beside it, but rounding.

    The caption goes through the encoder once for MAX_TOGETHER samples. loaded: as it is asked for text to image.
    Raises ValueError: no caption, one that is too long, a model that cannot paint.
    """
    example = ask(loaded.context(), NAME, None, caption)
    found: list[Sample] = []
    for start in range(0, sampling.samples, MAX_TOGETHER):
        seeds = range(sampling.seed + start, sampling.seed + min(start + MAX_TOGETHER, sampling.samples))
        config = codes_config(
            loaded, beams=len(seeds), sampling=True, top_k=sampling.top_k, top_p=sampling.top_p,
            temperature=sampling.temperature,
        )  # fmt: skip
        (hypotheses,) = generate(loaded.model, loaded.pack([example]), config, draw=SeededDraw(seeds))
        for each in hypotheses:
            codes = [token - loaded.vocab.code_start for token in each.tokens[:-1]]
            found.append(Sample(seeds[each.beam], codes, each.score))
    return sorted(found)


def paint(samples: Sequence[Sample], coder: Coder | ScenesCoder) -> list[np.ndarray]:
    """uint8 [H, W, 3] of each."""
    return coder.paint([np.array(sample.codes, np.int64) for sample in samples])


def ranked(
    samples: Sequence[Sample], pictures: Sequence[np.ndarray], clip: Clip, caption: str
) -> tuple[list[Sample], list[np.ndarray]]:
    """Both by CLIP's cosine of picture and caption, best first."""
    best = [each.tolist() for each in rerank(clip, pictures, caption=without_slashes(caption))]
    found = [samples[k]._replace(similarity=score) for score, k in zip(*best, strict=True)]
    return found, [pictures[k] for k in best[1]]


def paint_text(
    checkpoint: str | Path, caption: str, sampling: Sampling, *, how: How = AS_THE_TASK_SAYS,
    codes_model: Path | None = None, clip: Path | None = None, png: Path | None = None, average: bool = False,
    vocab: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Samples of one caption: {"caption", the sampling, "ranked_by": "clip" or "seed", "samples": of `Sample`}.

    codes_model: as `coder_of` takes it; without it nothing is painted. clip: ranks by it, best first. png: the gallery
    goes here, and what is returned beside it, as JSON. Everything is loaded before anything is sampled. Raises
    ValueError as what it calls.
    """
    if (png is not None or clip is not None) and codes_model is None:
        raise ValueError("--png and --rerank want pictures: say what paints the codes, --codes-model DIR")
    loaded = asked_as(load_model(checkpoint, average=average, vocab=vocab, precision=how.precision), NAME, how)
    print(loaded.describe(), file=sys.stderr)
    coder = None
    if codes_model is not None:
        coder = coder_of(codes_model, loaded.model.config.code_image_size, loaded.device)
        check_codes(coder, loaded.vocab, str(codes_model))
    judge = load_clip(clip, loaded.device) if clip is not None else None
    samples = sample_codes(loaded, caption, sampling)
    pictures = paint(samples, coder) if coder is not None else []
    if judge is not None:
        samples, pictures = ranked(samples, pictures, judge, caption)
    told = {
        "caption": caption, **dataclasses.asdict(sampling), "ranked_by": "seed" if judge is None else "clip",
        "samples": [sample._asdict() for sample in samples],
    }  # fmt: skip
    if png is not None:
        notes = [_note(sample) for sample in samples]
        with new_content(png) as partial:
            draw_gallery([Entry(caption=caption, pictures=pictures, notes=notes)]).save(partial)
        replace_file(png.with_name(f"{png.name}.json"), json.dumps(told) + "\n")
    return told


def _note(sample: Sample) -> str:
    return f"seed {sample.seed}" + (f", CLIP {sample.similarity:.3f}" if sample.similarity is not None else "")
