"""Self-critical sequence training: what the model says is rewarded, beside what else it says; captions by CIDEr-D.

Of each example the B hypotheses of a search (evaluation mode) are rewarded with their score less the mean score
of the other B - 1, and the loss is the sum over their tokens of -log p * reward, divided by the number of tokens
(docs/ofa.md, Fine-tuning: SCST). That is the cross entropy of a batch whose runs are the hypotheses and whose weights
are the rewards: preparing a step makes such batches, and all else is as in any other. A picture is encoded once for all
of its hypotheses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ofa_ds.batch import Batch, references_of
from ofa_ds.config import CriterionConfig, Recipe
from ofa_ds.data.document_frequency import DocumentFrequency, of_shards, read_document_frequency
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab
from ofa_ds.engine.copying import to_device
from ofa_ds.engine.engine import Engine
from ofa_ds.inference.generate import GenerationConfig, Hypothesis, generate
from ofa_ds.model.ofa import OFA
from ofa_ds.places import places_of
from ofa_ds.tasks.cider import CiderD
from ofa_ds.terms import BOS_ID
from ofa_ds.train.criteria import Criterion
from ofa_ds.train.objective import MicroLoss, Prepared, TaskLoss

Tokens = list[int]
"""Of a hypothesis: without bos, with eos."""


class SelfCritical(TaskLoss):
    """Learns from its own answers; what they are worth, a kind of this says."""

    logged = ("reward",)
    """Mean score of all hypotheses, before the baseline is taken off."""

    def __init__(self, vocab: Vocab, criterion: CriterionConfig, search: GenerationConfig) -> None:
        super().__init__(Criterion(constraint_range=criterion.constraint_range or None))
        self.copies = 0
        self._vocab, self._search = vocab, search

    def prepare(self, engine: Engine, batches: Sequence[Batch]) -> list[Prepared]:
        """The parameters are gathered once for the searches of all micro-batches.

        The answers of one are rewarded on another thread while those of the next are searched.
        """
        with ThreadPoolExecutor(1) as other, engine.gathered() as model:
            waiting = []
            for batch in batches:
                found = self.found(model, batch.to(engine.device), engine.num_updates)
                tokens = [[hypothesis.tokens for hypothesis in hypotheses] for hypotheses in found]
                waiting.append(other.submit(self.rewarded, batch, tokens))
            return [each.result() for each in waiting]

    def found(self, model: OFA, batch: Batch, step: int) -> list[list[Hypothesis]]:
        """The hypotheses of each example in this step."""
        return generate(model, batch, self._search)

    def rewarded(self, batch: Batch, hypotheses: Sequence[Sequence[Tokens]]) -> Prepared:
        """The batch of these hypotheses of its examples, best first, with their rewards as weights."""
        scores = self.scored(batch, hypotheses)
        rewards = [reward for each in scores for reward in beside_others(each)]
        spoken = with_hypotheses(batch, hypotheses, rewards)
        spoken = spoken.with_places(places_of(spoken))
        logged = torch.tensor([[sum(map(sum, scores)), sum(map(len, scores))]], dtype=torch.float64)
        num_tokens = torch.tensor([len(spoken.targets)], dtype=torch.float64)  # none of them is a pad
        return Prepared(batch=spoken, counts=num_tokens, more=logged)

    def scored(self, batch: Batch, hypotheses: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """Of every hypothesis of every example, before the baseline is taken off."""
        raise NotImplementedError

    def loss(self, engine: Engine, prepared: Prepared, counts: torch.Tensor) -> MicroLoss:
        return super().loss(engine, prepared, counts)._replace(logged=to_device(prepared.more, engine.device))


class CaptionCritical(SelfCritical):
    """Captions are rewarded by CIDEr-D; the micro-batches are packed with references."""

    def __init__(self, frequency: DocumentFrequency, vocab: Vocab, criterion: CriterionConfig) -> None:
        search = GenerationConfig(
            beams=criterion.scst_beams, max_len_b=criterion.scst_max_tokens,
            no_repeat_ngram=criterion.scst_no_repeat_ngram,
        )  # fmt: skip
        super().__init__(vocab, criterion, search)
        self._scorer = CiderD(frequency)

    def scored(self, batch: Batch, hypotheses: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        return self.scores(references_of(batch), hypotheses)

    def scores(self, references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """CIDEr-D of every hypothesis of every example."""
        pairs = zip(hypotheses, references, strict=True)
        decode = self._vocab.decode
        return [self._scorer.scores([decode(tokens[:-1]) for tokens in each], right) for each, right in pairs]


def caption_critical(recipe: Recipe, shards: Shards, vocab: Vocab) -> CaptionCritical:
    """As the recipe says, whose criterion.kind is scst (`ofa_ds.cluster.check_recipe` has seen it).

    Raises ValueError: the file of document frequencies is none, or the shards have too few captions to count; OSError
    where that file is not there.
    """
    given = recipe.criterion.scst_document_frequency
    frequency = read_document_frequency(Path(given)) if given else of_shards(shards)
    return CaptionCritical(frequency, vocab, recipe.criterion)


def beside_others(scores: Sequence[float]) -> list[float]:
    """Each score less the mean of the others; 0 where there is no other."""
    total, others = sum(scores), len(scores) - 1
    return [score - (total - score) / others if others else 0.0 for score in scores]


def with_hypotheses(
    batch: Batch, hypotheses: Sequence[Sequence[Tokens]], rewards: Sequence[float],
    *, dtype: torch.dtype = torch.float32,
) -> Batch:  # fmt: skip
    """The batch with a run of the decoder for each hypothesis of each example; its weight is its reward.

    dtype: of the weights.
    """
    runs = [(example, tokens) for example, each in enumerate(hypotheses) for tokens in each]
    lengths = np.array([len(tokens) for _, tokens in runs], np.int64)
    example_R = torch.tensor([example for example, _ in runs], dtype=torch.int64)
    given = [np.array([BOS_ID, *tokens[:-1]], np.int64) for _, tokens in runs]
    asked = [np.array(tokens, np.int64) for _, tokens in runs]
    weights, none = torch.tensor(rewards, dtype=dtype), torch.empty(0, dtype=torch.int64)
    return dataclasses.replace(
        batch,
        decoder_tokens=_join(given), decoder_position=_join([np.arange(length) for length in lengths]),
        decoder_offsets=torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
        targets=_join(asked), loss_weight=weights.repeat_interleave(torch.from_numpy(lengths)),
        code_mask=batch.code_mask[example_R], task=batch.task[example_R], group=batch.group[example_R],
        encoder_of=example_R, allowed_ids=none, allowed_offsets=none, reference_bytes=none.to(torch.uint8),
        reference_offsets=none, num_references=none,
    )  # fmt: skip


def _join(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *arrays]))
