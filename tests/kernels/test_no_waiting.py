"""From the arrival of a batch to DeepSpeed's step the host never waits for the device: whole steps, kernels and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training_step import VOCAB, arrived, config, engine_of
from waiting import Waits, Watch, marked, unwatched_launches

from ofa_ds.batch import Batch
from ofa_ds.engine.engine import Engine
from ofa_ds.model.config import ModelConfig, ResNetConfig
from ofa_ds.model.decoder import Decoder
from ofa_ds.model.layers import FeedForward
from ofa_ds.train import criteria, scst, step
from ofa_ds.train.criteria import Criterion
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import Objective, TaskLoss, TokenLoss
from ofa_ds.train.spikes import LEAST, LossWindow

DEVICE = torch.device("cpu")


class Watched:
    """`take` runs a step under watch, until DeepSpeed would look at the gradients."""

    def __init__(self, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, num_batches: int = 1) -> None:
        self.watch, self.model, self.num_batches = Watch(), model, num_batches
        self.engine = engine_of(model, device=DEVICE, before_update=self._ends, accumulation=num_batches)
        module = self.engine.module
        self.watch.put([*module.parameters(), *module.buffers(), *self.engine._buffers_before])
        self.num_ops = 0
        unwatched_launches(self.watch, monkeypatch)
        monkeypatch.setattr(step, "to_device", marked(self.watch, step.to_device))
        monkeypatch.setattr(step, "later", lambda x: lambda: [0.0] * len(x))  # an event is waited for, long past
        monkeypatch.setattr(Batch, "to", lambda batch, device: self._arrives(batch))
        self.window = Window(DEVICE)
        self.watch.put([self.window._sums, self.window._step])

    def _ends(self) -> None:
        self.num_ops, self.watch.paused = self.watch.num_ops, True

    def _arrives(self, batch: Batch) -> Batch:
        with self.watch.off():
            tensors = [getattr(batch, name) for name in batch.__dataclass_fields__]
            self.watch.put(x for each in tensors for x in (each if isinstance(each, tuple) else (each,)))
            batch.places.map(lambda x: self.watch.put([x]) or x)
        return batch

    def take(self, objective: Objective, *, before: LossWindow | None = None, **options: Any) -> step.StepResult:
        batches = [arrived(seed, self.model, **options) for seed in range(self.num_batches)]
        prepare = objective.prepare

        def on_the_host(*args: Any) -> Any:
            with self.watch.off():
                return prepare(*args)

        objective.prepare = on_the_host  # of batches that are not on the device yet
        with self.watch.watching():
            return step.train_step(self.engine, batches, self.window, objective, before=before)


@pytest.mark.long
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_pretraining_waits_for_nothing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(config(kernel, pixel_norm="imagenet"), monkeypatch, num_batches=2 if kernel == "torch" else 1)
    result = watched.take(TokenLoss(0.1), before=LossWindow(1e9, [1.0] * LEAST))
    assert watched.num_ops > 500, "hardly anything was watched"
    assert len(result.losses) == watched.num_batches and result.spike is None and watched.window.num_counted == 1
    for name, parameter in watched.engine.module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_spike_is_left_out_without_waiting_for_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, losses = Watched(config("torch"), monkeypatch), LossWindow(5.0, [1.0] * LEAST)
    result = watched.take(TokenLoss(0.1), before=losses)
    assert "sigma above the mean" in result.spike and watched.engine.skipped
    assert losses.losses == [1.0] * LEAST and watched.window.num_counted == 0


CRITERIA = {
    "plain, prompts": (Criterion(label_smoothing=0.1, drop_worst_ratio=0.2), {"prompt": 1}),
    "constrained": (Criterion(label_smoothing=0.1), {"constrained": True, "prompt": 1}),
    "range": (Criterion(constraint_range=(4, VOCAB)), {}),
    "encouraging": (Criterion(label_smoothing=0.1, encouraging=True), {"constrained": True}),
    "R-Drop": (Criterion(label_smoothing=0.1, rdrop_alpha=1.0), {"prompt": 1}),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_fine_tuning_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, options = CRITERIA[name]
    watched = Watched(config("torch"), monkeypatch)
    watched.take(TaskLoss(criterion), **options)
    assert watched.num_ops > 500 and watched.window.num_counted == 1


FORMS: dict[str, dict[str, Any]] = {
    "ResNet": {"backbone": ResNetConfig(depths=(1, 1, 1)), "batch_norm": "batch"},
    "OFASys": {"use_ofasys": True},
    "OFASys, entangled positions": {"use_ofasys": True, "entangle_position_embedding": True},
    "interpolated positions": {"interpolate_position": True},
    "activation checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("name", FORMS)
def test_no_form_of_the_model_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(config("torch", **FORMS[name]), monkeypatch)
    watched.take(TokenLoss())
    assert watched.window.num_counted == 1


def test_hypotheses_that_share_a_picture_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(config("torch"), monkeypatch)

    class Spoken(TaskLoss):
        def prepare(self, engine: Engine, batches: list[Batch]) -> list[Any]:
            said = [[[5, 6, 2], [7, 2]]] * batches[0].num_examples
            rewards = [0.5] * 2 * batches[0].num_examples
            return super().prepare(engine, [scst.with_hypotheses(batch, said, rewards) for batch in batches])

    watched.take(Spoken(Criterion()))
    assert watched.window.num_counted == 1


def in_forward(change: Callable[[Tensor], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
        positions = Decoder.positions

        def waiting(self: Decoder, text_X: Tensor, code_Y: Tensor) -> Any:
            change(text_X)
            return positions(self, text_X, code_Y)

        monkeypatch.setattr(Decoder, "positions", waiting)

    return put_back


def in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    feed_forward = FeedForward.feed_forward

    def waiting(self: FeedForward, normed_ND: Tensor) -> Tensor:
        out = feed_forward(self, normed_ND)
        out.register_hook(lambda grad: None if grad.sum().item() else None)
        return out

    monkeypatch.setattr(FeedForward, "feed_forward", waiting)


def in_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Window.add_micro_batch

    def waiting(self: Window, *args: Any, **options: Any) -> None:
        self._step[0] += torch.tensor([1.0], device=self.device)[0]
        add(self, *args, **options)

    monkeypatch.setattr(Window, "add_micro_batch", waiting)


PUT_BACK = {
    "unique": in_forward(lambda x: x.unique()),
    "nonzero": in_forward(lambda x: x.nonzero()),
    "a mask as index": in_forward(lambda x: x[x > 1]),
    "setting by a mask": in_forward(lambda x: x.clone().__setitem__(x > 1, 3)),
    "masked_select": in_forward(lambda x: x.masked_select(x > 1)),
    "a look at a number": in_forward(lambda x: bool(x.sum() > 3)),
    "lengths without their sum": in_forward(lambda x: torch.repeat_interleave(x, x)),
    "tolist": in_forward(lambda x: x.tolist()),
    "numpy": in_forward(lambda x: x.numpy()),
    "cpu": in_forward(lambda x: x.cpu()),
    "a list as index": in_forward(lambda x: x[[0, 1]]),
    "new_tensor": in_forward(lambda x: x.new_tensor(3)),
    "a tensor of the host": in_forward(lambda x: x + torch.arange(len(x))),
    "a copy that is waited for": in_forward(lambda x: torch.ones(3).to(DEVICE)),
    "equal": in_forward(lambda x: torch.equal(x, x + 1)),
    "backward": in_backward,
    "metrics": in_metrics,
}


@pytest.mark.parametrize("name", PUT_BACK)
def test_one_that_waits_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(config("torch"), monkeypatch, num_batches=2 if name == "metrics" else 1)
    PUT_BACK[name](monkeypatch)
    with pytest.raises(Waits):
        watched.take(TokenLoss())


def test_a_bonus_with_a_tangent_waits_for_nothing() -> None:
    watch, logp_NV = Watch(), torch.randn(3, 8).log_softmax(-1)
    target_N = torch.tensor([1, 2, 3])
    watch.put([logp_NV, target_N])
    with watch.watching():
        criteria._bonus(logp_NV, target_N, Criterion(encouraging=True, log_end=0.5))
