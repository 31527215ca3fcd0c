"""Text and code generation: beam search, greedy decoding and sampling over a packed batch (docs/ofa.md, Generation).

Legend: E examples, B beams, R = E * B rows (example-major), K candidates, V vocabulary. A beam whose score is -inf
is dead: it still runs through the model, and nothing comes of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.inference.draws import Draw, most_probable
from ofa_ds.inference.repeats import forbid_repeats
from ofa_ds.model.allowed_ids import allowed_ids
from ofa_ds.tasks.candidates import ROOT, Trie
from ofa_ds.terms import BOS_ID, EOS_ID, NUM_SPECIAL_IDS, PAD_ID, UNK_ID

FORCED_EOS_SCORE = 1.0


class DecodingState(Protocol):
    """The keys and values of the rows decoded so far."""

    def reorder(self, index_R: Tensor) -> None:
        """Row r goes on from what row index_R[r] was; both belong to one example."""


MIN_TEMPERATURE = 1e-30


class IncrementalModel(Protocol):
    """What `generate` asks of a model (see `ofa_ds.model`)."""

    def start_decoding(
        self, batch: Batch, beams: int = 1, *, read: Sequence[Sequence[int]] | None = None
    ) -> DecodingState: ...

    def decode_step(self, tokens_R: Tensor, state: Any, id_range: tuple[int, int] | None = None) -> Tensor:
        """With a range, which only image codes are generated with: logits of the special ids and of it alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Names and defaults follow the original's generator; lengths count eos, not bos."""

    beams: int = 5
    """Hypotheses kept and returned for an example; 1 is greedy decoding. With sampling: independent samples."""
    min_len: int = 1
    max_len_a: float = 0.0
    max_len_b: int = 200
    """Only eos may follow int(max_len_a * longest source text of the batch + max_len_b) tokens."""
    len_penalty: float = 1.0
    normalize: bool = True
    """Score = sum of log-probabilities / length ** len_penalty; False: the sum."""
    temperature: float = 1.0
    unk_penalty: float = 0.0
    no_repeat_ngram: int = 0
    """No sequence of this many tokens, bos included, comes twice; 0 for no limit."""
    constraint_range: tuple[int, int] | None = None
    """Besides the special ids only start <= id < end may come."""
    only_range: tuple[int, int] | None = None
    """Nothing but start <= id < end and eos may come, whose probabilities stay what they are."""
    zero_shot: bool = False
    """Constraints after the softmax: what remains is not renormalised."""
    gen_code: bool = False
    """Every target is a run of image codes: their positions and norm, and no special id before max_len."""
    ignore_eos: bool = False
    """The eos that max_len forces scores 1 instead of its log-probability, as in the original."""
    sampling: bool = False
    top_k: int = 0
    """Sample among this many most probable tokens; 0 for all."""
    top_p: float = 0.0
    """Sample among the most probable tokens that together reach this probability; 0 for all."""

    def __post_init__(self) -> None:
        if self.beams < 1 or self.temperature <= 0 or self.min_len < 0:
            raise ValueError(f"want beams >= 1, temperature > 0, min_len >= 0, got {self}")
        if self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature: want at least {MIN_TEMPERATURE}, below which logits have no room in fp32, "
                f"got {self.temperature}; top_k 1 takes the most probable token"
            )
        if (self.top_k or self.top_p) and not self.sampling:
            raise ValueError("top_k and top_p choose among samples; set sampling=True, or leave them out")
        if self.top_k and self.top_p:
            raise ValueError(f"top_k {self.top_k} and top_p {self.top_p} exclude each other; want one of them")


class Hypothesis(NamedTuple):
    tokens: list[int]
    """Without bos, with eos; a given prefix is part of it."""
    score: float
    positional_scores: list[float]
    """Log-probability of each token; of a forced prefix too."""
    beam: int
    """Which of the example's beams it was when it ended: of samples, which sample."""


@torch.no_grad()
def generate(
    models: IncrementalModel | Sequence[IncrementalModel],
    batch: Batch,
    config: GenerationConfig,
    *,
    prefix: Sequence[Sequence[int]] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    trie: Trie | None = None,
    draw: Draw | None = None,
    lockstep: bool = False,
) -> list[list[Hypothesis]]:
    """Hypotheses of each example, best first; fewer than `beams` where constraints leave fewer, or none.

    models: several are an ensemble, the mean of their probabilities; each in evaluation mode. `batch` may lack targets.
    prefix: tokens that each example must begin with (may be empty). trie: answers allowed after the prefix.
    prompts: what each decoder has read after bos (may be empty, may hold eos), which is no part of a hypothesis, of its
    score or of any limit.
    draw: of the samples. lockstep: call the model as often as the rank that needs most, as ZeRO-3 requires.
    """
    models = list(models) if isinstance(models, Sequence) else [models]
    if config.gen_code:
        batch = dataclasses.replace(batch, code_mask=torch.ones_like(batch.code_mask))
    if prefix is not None and (len(prefix) != batch.num_examples or any(EOS_ID in row for row in prefix)):
        raise ValueError(f"want a prefix without eos for each of {batch.num_examples} examples, got {prefix}")
    if config.sampling != (draw is not None):
        raise ValueError("samples are drawn, and nothing else is: give `draw` with sampling=True")
    longest = int(batch.source_position.max()) + 1 if batch.source_position.numel() else 0
    max_len = int(config.max_len_a * longest + config.max_len_b)
    given = [[BOS_ID, *prompt] for prompt in prompts or [()] * batch.num_examples]
    if config.gen_code and config.constraint_range and not config.zero_shot and (prefix, prompts, trie) == (None,) * 3:
        return _codes_alone(models, batch, config, max_len, draw, lockstep)
    search = _Search(config, [tokens[-1] for tokens in given], max_len, batch.decoder_offsets.device, draw)
    rules = _Rules(config, search, trie, prefix)
    read = None if prompts is None else [tokens[:-1] for tokens in given]
    states = [model.start_decoding(batch, beams=config.beams, read=read) for model in models]

    def step(tokens_R: Tensor) -> list[Tensor]:
        return [model.decode_step(tokens_R, state) for model, state in zip(models, states, strict=True)]

    return _run(search, rules, states, step, lockstep)


def _codes_alone(
    models: Sequence[IncrementalModel], batch: Batch, config: GenerationConfig, max_len: int, draw: Draw | None,
    lockstep: bool,
) -> list[list[Hypothesis]]:  # fmt: skip
    """The same among the special ids and the codes, under numbers of their own: of OFA's vocabulary a seventh."""
    start, end = config.constraint_range
    shift = start - NUM_SPECIAL_IDS
    search = _Search(config, [BOS_ID] * batch.num_examples, max_len, batch.decoder_offsets.device, draw)
    rules = _Rules(dataclasses.replace(config, constraint_range=None), search, None, None)
    states = [model.start_decoding(batch, beams=config.beams) for model in models]

    def step(tokens_R: Tensor) -> list[Tensor]:
        ids_R = torch.where(tokens_R < NUM_SPECIAL_IDS, tokens_R, tokens_R + shift)
        return [model.decode_step(ids_R, state, (start, end)) for model, state in zip(models, states, strict=True)]

    found = _run(search, rules, states, step, lockstep)
    return [
        [each._replace(tokens=[t if t < NUM_SPECIAL_IDS else t + shift for t in each.tokens]) for each in hypotheses]
        for hypotheses in found
    ]


def _run(
    search: _Search, rules: _Rules, states: Sequence[DecodingState], step: Callable[[Tensor], list[Tensor]],
    lockstep: bool,
) -> list[list[Hypothesis]]:  # fmt: skip
    """step: the last tokens [R] -> the logits [R, V] of each model."""
    while _anyone(not search.finished, lockstep, search.device):
        logits = step(search.last_tokens())
        if search.finished:
            continue
        logp_EBV = rules.restrict(_ensemble([rules.log_probabilities(logits_RV) for logits_RV in logits]))
        moved_R = search.advance(logp_EBV)
        rules.follow(moved_R)
        if moved_R is not None:
            for state in states:
                state.reorder(moved_R)
    return [sorted(found, key=lambda hypothesis: -hypothesis.score) for found in search.hypotheses]


def _anyone(unfinished: bool, lockstep: bool, device: torch.device) -> bool:
    """Whether this rank, or with `lockstep` any rank, has something left to do."""
    if not lockstep or not dist.is_initialized():
        return unfinished
    flag = torch.tensor(int(unfinished), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _ensemble(logp: list[Tensor]) -> Tensor:
    """Log of the mean probability."""
    return logp[0] if len(logp) == 1 else torch.stack(logp).logsumexp(0) - math.log(len(logp))


class _Search:
    """The beams of the examples that are still open (E of them), and the hypotheses of all."""

    def __init__(
        self, config: GenerationConfig, first: Sequence[int], max_len: int, device: torch.device, draw: Draw | None
    ) -> None:
        """first: what each example is fed before anything is generated."""
        self.config, self.max_len, self.device, self._draw = config, max_len, device, draw
        num_examples = len(first)
        self.step = 0
        """Tokens decided so far, and the place of the next one."""
        self.tokens_EBL = torch.full((num_examples, config.beams, max_len + 2), PAD_ID, device=device)
        self.tokens_EBL[..., 0] = torch.tensor(first, dtype=torch.int64, device=device)[:, None]
        self.history_EBL: Tensor | None = None
        """Cumulative scores after each token, in the precision of the log-probabilities."""
        self.hypotheses: list[list[Hypothesis]] = [[] for _ in range(num_examples)]
        self.examples = list(range(num_examples))
        """Which example each row of the tensors is."""
        self.open = set(self.examples)

    @property
    def finished(self) -> bool:
        return not self.open

    def last_tokens(self) -> Tensor:
        """int64 [R]: what each row is fed next."""
        return self.tokens_EBL[..., min(self.step, self.max_len)].flatten()

    def so_far(self) -> Tensor:
        """int64 [R, 1 + step]: bos and the tokens of each row."""
        return self.tokens_EBL[..., : self.step + 1].flatten(0, 1)

    def advance(self, logp_EBV: Tensor) -> Tensor | None:
        """Decides the next token of every row. Returns the rows [R] that go on, in order; None if all as before."""
        step, beams = self.step, self.config.beams
        if self.history_EBL is None:
            self.history_EBL = logp_EBV.new_zeros(len(self.examples), beams, self.max_len + 1)
        choose = self._samples if self.config.sampling else self._best
        score_EK, token_EK, beam_EK = choose(logp_EBV)
        ended_EK = (token_EK == EOS_ID) & (score_EK > -torch.inf)
        self._finish(score_EK, beam_EK, ended_EK[:, :beams])
        # The first `beams` candidates that do not end; where there are fewer, ended ones fill up as dead beams.
        rank_EK = torch.arange(score_EK.shape[1], device=self.device).expand_as(score_EK)
        if not self.config.sampling:
            rank_EK = (rank_EK + score_EK.shape[1] * ended_EK).argsort(dim=1)[:, :beams]
        beam_EB = beam_EK.gather(1, rank_EK)
        self.tokens_EBL = _of_beams(self.tokens_EBL, beam_EB)
        self.history_EBL = _of_beams(self.history_EBL, beam_EB)
        self.tokens_EBL[..., step + 1] = token_EK.gather(1, rank_EK)
        score_EB = score_EK.masked_fill(ended_EK, -torch.inf).gather(1, rank_EK)
        self.history_EBL[..., step] = score_EB
        self.step += 1
        alive = (score_EB > -torch.inf).any(1).tolist() if step < self.max_len else [False] * len(self.examples)
        self.open -= {example for example, goes_on in zip(self.examples, alive, strict=True) if not goes_on}
        if step == 0:  # all beams of an example are still the same
            beam_EB = torch.arange(beams, device=self.device).expand_as(beam_EB)
        return self._close_finished(beam_EB)

    def _close_finished(self, beam_EB: Tensor) -> Tensor | None:
        """Takes the rows of finished examples out, unless all are. Returns what `advance` does."""
        all_rows_EB = torch.arange(beam_EB.numel(), device=self.device).view_as(beam_EB)
        rows_EB = all_rows_EB[:, :1] + beam_EB
        kept = [i for i, example in enumerate(self.examples) if example in self.open]
        if kept and len(kept) < len(self.examples):
            self.examples = [self.examples[i] for i in kept]
            self.tokens_EBL, self.history_EBL = self.tokens_EBL[kept], self.history_EBL[kept]
            return rows_EB[kept].flatten()
        return None if torch.equal(rows_EB, all_rows_EB) else rows_EB.flatten()

    def _best(self, logp_EBV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, tokens and beams [E, K] of the 2 * beams best continuations, best first."""
        vocab_size = logp_EBV.shape[-1]
        total_EBV = logp_EBV[:, :1]
        if self.step > 0:
            total_EBV = logp_EBV.add_(self.history_EBL[..., self.step - 1, None])
        num_candidates = min(2 * self.config.beams, total_EBV[0].numel() - 1)
        if num_candidates < self.config.beams:
            raise ValueError(f"{self.config.beams} beams want a vocabulary larger than that, got {vocab_size} ids")
        score_EK, flat_EK = total_EBV.flatten(1).topk(num_candidates)
        return score_EK, flat_EK % vocab_size, flat_EK // vocab_size

    def _samples(self, logp_EBV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, tokens and beams [E, B] of one sample a beam."""
        logp_RK, token_RK = most_probable(logp_EBV.flatten(0, 1), self.config.top_k, self.config.top_p)
        rows = [example * self.config.beams + beam for example in self.examples for beam in range(self.config.beams)]
        best_R1 = logp_RK[:, :1]
        # All may be less than the smallest number there is, such as the eos that a limit forces at a low temperature.
        tiny_R1 = (best_R1 > -torch.inf) & (best_R1.exp() == 0)
        place_R1 = self._draw((logp_RK - torch.where(tiny_R1, best_R1, 0.0)).exp(), rows)[:, None]
        # Where no token is possible eos is drawn, with its score of -inf: the beam is dead.
        dead_R1 = logp_RK.gather(1, place_R1) == -torch.inf
        token_EB = token_RK.gather(1, place_R1).masked_fill(dead_R1, EOS_ID).view(logp_EBV.shape[:2])
        score_EB = logp_EBV.gather(2, token_EB[..., None])[..., 0]
        if self.step > 0:
            score_EB = score_EB + self.history_EBL[..., self.step - 1]
        return score_EB, token_EB, torch.arange(self.config.beams, device=self.device).expand_as(token_EB)

    def _finish(self, score_EK: Tensor, beam_EK: Tensor, ended_EB: Tensor) -> None:
        """Stores the hypotheses that end here, in the order of their rank, up to `beams` for each example."""
        step, config = self.step, self.config
        for e, k in ended_EB.nonzero().tolist():
            example = self.examples[e]
            if example not in self.open:
                continue
            beam, total = int(beam_EK[e, k]), float(score_EK[e, k])
            cumulative = [0.0, *self.history_EBL[e, beam, :step].tolist(), total]
            positional = [after - before for before, after in zip(cumulative, cumulative[1:], strict=False)]
            score = total / (step + 1) ** config.len_penalty if config.normalize else total
            tokens = [*self.tokens_EBL[e, beam, 1 : step + 1].tolist(), EOS_ID]
            self.hypotheses[example].append(Hypothesis(tokens, score, positional, beam))
            if len(self.hypotheses[example]) == config.beams:
                self.open.discard(example)


class _Rules:
    """Which tokens may come next, and the walk of each row through the trie."""

    def __init__(
        self, config: GenerationConfig, search: _Search, trie: Trie | None, prefix: Sequence[Sequence[int]] | None
    ) -> None:
        self.config, self.search = config, search
        num_examples = len(search.examples)
        self.prefix = [list(row) for row in prefix or [()] * num_examples for _ in range(config.beams)]
        self.longest_prefix = max(map(len, self.prefix), default=0)
        self.trie = trie
        self.vertex_R: list[int | None] = [ROOT] * len(self.prefix)
        """Where each row stands in the trie; None: no answer begins so."""

    def log_probabilities(self, logits_RV: Tensor) -> Tensor:
        """[E, B, V]: log-softmax (fp32 at least) under temperature, range and trie."""
        config = self.config
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        if config.temperature != 1:
            logits_RV = logits_RV / config.temperature
        allowed = self._allowed(logits_RV)
        if allowed is not None and not config.zero_shot:
            logits_RV = logits_RV.masked_fill(~allowed, -torch.inf)
        logp_RV = logits_RV.log_softmax(-1)
        if allowed is not None and config.zero_shot:
            logp_RV = logp_RV.masked_fill(~allowed, -torch.inf)
        return logp_RV.unflatten(0, (-1, config.beams))

    def _allowed(self, logits_RV: Tensor) -> Tensor | None:
        """bool [R, V] or [V]; None where everything is."""
        allowed = None
        if self.config.constraint_range is not None:
            allowed = allowed_ids(logits_RV.shape[1], self.config.constraint_range, logits_RV.device)
        if self.trie is None:
            return allowed
        rows, columns = [], []
        mask_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
        for row, vertex in enumerate(self.vertex_R):
            if self.search.step < len(self.prefix[row]):
                mask_RV[row] = True
                continue
            ids = self.trie.allowed(vertex)
            rows.append(np.full(len(ids), row))
            columns.append(ids)
        if rows:
            mask_RV[torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))] = True
        return mask_RV if allowed is None else mask_RV & allowed

    def restrict(self, logp_EBV: Tensor) -> Tensor:
        """The same, changed in place: -inf at tokens that length, prefix, repetition or kind forbid."""
        config, search = self.config, self.search
        step, max_len = search.step, search.max_len
        # In place, here and where scores are added up: a copy of all the vocabulary takes as long as a softmax of it.
        logp_RV = logp_EBV.flatten(0, 1).nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        logp_RV[:, PAD_ID] = -torch.inf
        logp_RV[:, UNK_ID] -= config.unk_penalty
        if config.only_range is not None and step >= self.longest_prefix:
            ids_V, (start, end) = torch.arange(logp_RV.shape[1], device=logp_RV.device), config.only_range
            logp_RV[:, ((ids_V < start) | (ids_V >= end)) & (ids_V != EOS_ID)] = -torch.inf
        if config.gen_code and step < max_len:
            logp_RV[:, :NUM_SPECIAL_IDS] = -torch.inf
        if step >= max_len:
            last_RV = torch.full_like(logp_RV, -torch.inf)
            last_RV[:, EOS_ID] = FORCED_EOS_SCORE if config.ignore_eos else logp_RV[:, EOS_ID]
            logp_RV = last_RV
        if step < min(self.longest_prefix, max_len):
            for row, tokens in enumerate(self.prefix):
                if step < len(tokens):
                    forced = logp_RV[row, tokens[step]].clone()
                    logp_RV[row] = -torch.inf
                    logp_RV[row, tokens[step]] = forced
        elif step < config.min_len:
            logp_RV[:, EOS_ID] = -torch.inf
        if config.no_repeat_ngram:
            forbid_repeats(logp_RV, search.so_far(), config.no_repeat_ngram)
        return logp_RV.view_as(logp_EBV)

    def follow(self, moved_R: Tensor | None) -> None:
        """Goes along with the rows that go on, one token further in the trie."""
        if moved_R is not None:
            rows = moved_R.tolist()
            self.prefix, self.vertex_R = [self.prefix[row] for row in rows], [self.vertex_R[row] for row in rows]
        if self.trie is not None:
            step = self.search.step
            tokens = self.search.tokens_EBL[..., step].flatten().tolist()
            for row, (token, vertex) in enumerate(zip(tokens, self.vertex_R, strict=True)):
                if step > len(self.prefix[row]):
                    self.vertex_R[row] = self.trie.follow(vertex, token)


def _of_beams(value_EBL: Tensor, beam_EB: Tensor) -> Tensor:
    return value_EBL.gather(1, beam_EB[..., None].expand_as(value_EBL))
