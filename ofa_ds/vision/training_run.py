"""A training run of a VQGAN in a directory: checkpoints that it goes on from, and what `load_vqgan` reads.

RUN/vqgan.json, vqgan.safetensors, pictures.png    of the newest checkpoint
RUN/step_00001000/                                 the same, and the optimisers' state; the newest two are kept
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import PARTIAL, check_space, new_directory, refuse_inside, sync
from ofa_ds.storage.lease import Lease, held
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.files import CONFIG, WEIGHTS, load_vqgan, write_vqgan
from ofa_ds.vision.losses import load_lpips
from ofa_ds.vision.pixels import to_picture
from ofa_ds.vision.sources import open_pictures
from ofa_ds.vision.training import Settings, Told, Trainer, cut_square, new_model, perplexity

STATE, STATE_TENSORS, PICTURES = "training.json", "training.safetensors", "pictures.png"
FORMAT = {"format": "ofa-ds codes training", "version": 1}
KEPT = 2
SHOWN = 8
"""Pictures that are painted at each checkpoint, evenly spaced among all."""

_LOG_STEPS = 20
"""Steps whose codes the progress line counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with, beside its settings."""

    config: VqganConfig | None = None
    """None: that of `weights_of`."""
    weights_of: Path | None = None
    """A directory of a VQGAN; without it weights are random."""
    lpips: Sequence[Path] = ()
    """Files with the weights of the perceptual distance; it is left out where there are none."""


def train_codes(
    path: Path, out: Path, start: Start, settings: Settings, *, save_every: int, device: str,
    stopped: Callable[[], bool] = lambda: False, say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Train on the pictures of `path` in `out`, from its newest checkpoint on. Whether it came to its end.

    stopped: asked after each step; where it is true, a checkpoint is saved and the run ends.
    Raises ValueError: no pictures, `out` among them, other settings than the checkpoint's, losses or weights that are
    not finite; LeaseError.
    """
    if path.is_dir():  # the run's own pictures would be trained on, and another set than its checkpoint knows
        refuse_inside(out, path)
    pictures = open_pictures(path)
    lpips = load_lpips(start.lpips) if start.lpips else None
    with held(out) as lease:
        newest = _newest(out)
        if newest is None and (out / CONFIG).exists():
            raise ValueError(f"{out}: a VQGAN is there already, without a checkpoint to go on from; give another --out")
        weights_of = newest or start.weights_of
        model = load_vqgan(weights_of, say=say) if weights_of else new_model(start.config, settings.seed)
        with closing(Trainer(model, pictures, settings, device=torch.device(device), lpips=lpips)) as trainer:
            run = _Run(out, trainer, start, lease, say)
            if newest is not None:
                run.go_on(newest)
            return run.train(save_every, stopped)


class _Run:
    def __init__(self, out: Path, trainer: Trainer, start: Start, lease: Lease, say: Callable[[str], None]) -> None:
        self.out, self.trainer, self.lease, self.say = out, trainer, lease, say
        self.made_of = dataclasses.asdict(trainer.settings) | {
            "pictures": trainer.pictures.fingerprint, "lpips": [file.name for file in start.lpips],
            "model": json.loads(json.dumps(dataclasses.asdict(start.config or trainer.model.config))),
        }  # fmt: skip

    def go_on(self, folder: Path) -> None:
        """Raises ValueError where the checkpoint is of other settings or other pictures, or is damaged."""
        try:
            found = json.loads((folder / STATE).read_text(encoding="utf-8"))
            tensors = load_file(folder / STATE_TENSORS)
            if {key: found.get(key) for key in FORMAT} != FORMAT:
                raise ValueError(f"want {FORMAT}")
        except Exception as error:  # the library's own class has no stable place
            what = " ".join(str(error).split())
            raise ValueError(f"{folder}: damaged ({what}); remove it to go on from the one before") from error
        for key, value in self.made_of.items():
            if key != "num_steps" and found["made_of"].get(key) != value:
                raise ValueError(
                    f"{folder}: was trained with {key} {found['made_of'].get(key)}, now it is {value}; use what it "
                    "was, or another --out"
                )
        self.trainer.step = found["step"]
        _restore(self.trainer, tensors)
        self._publish(folder)
        self.say(f"{folder}: going on from step {self.trainer.step}")

    def train(self, save_every: int, stopped: Callable[[], bool]) -> bool:
        trainer, num_steps = self.trainer, self.trainer.settings.num_steps
        if trainer.step >= num_steps:
            self.say(f"{self.out}: is at step {trainer.step} of {num_steps} already")
            return True
        batch = trainer.settings.batch
        recent: list[Told] = []
        with closing(Progress(num_steps * batch, "training codes", "examples")) as progress:
            progress.skip(trainer.step * batch)
            while trainer.step < num_steps:
                recent = [*recent[1 - _LOG_STEPS :], self._step()]
                progress.note = _in_words(recent)
                progress.add(batch)
                is_asked = stopped()
                if is_asked or trainer.step % save_every == 0 or trainer.step == num_steps:
                    self.save(recent)
                if is_asked:
                    self.say(f"{self.out}: stopped at step {trainer.step}; the same command goes on from there")
                    return trainer.step == num_steps
        return True

    def _step(self) -> Told:
        try:
            return self.trainer.train_step()
        except FloatingPointError as error:
            raise self._lost(str(error)) from error

    def _lost(self, what: str) -> ValueError:
        """With the way out."""
        newest = _newest(self.out)
        way = f"go on with a smaller one: --from {newest} --out NEW" if newest else "begin again with a smaller one"
        return ValueError(f"{self.out}: {what}, with --lr {self.trainer.settings.lr:g}; {way}")

    def save(self, recent: Sequence[Told]) -> None:
        """A checkpoint, and its files as the run's own; older ones than the newest KEPT go. Raises ValueError."""
        folder = self.out / f"step_{self.trainer.step:08d}"
        tensors = _tensors(self.trainer)
        for name, value in [*self.trainer.model.state_dict().items(), *tensors.items()]:
            if not torch.isfinite(value).all():
                raise self._lost(f"step {self.trainer.step}: {name} is not finite any more")
        sheet, error = _sheet(self.trainer)
        self.lease.check()
        with new_directory(folder) as partial:
            write_vqgan(self.trainer.model, partial)
            sheet.save(partial / PICTURES)
            check_space(partial, sum(value.nbytes for value in tensors.values()), 3)
            save_file(tensors, partial / STATE_TENSORS)
            text = json.dumps(FORMAT | {"step": self.trainer.step, "made_of": self.made_of}, indent=1)
            (partial / STATE).write_text(f"{text}\n", encoding="utf-8")
            for name in (PICTURES, STATE_TENSORS, STATE):
                sync(partial / name)
        self._publish(folder)
        for old in _checkpoints(self.out)[:-KEPT]:
            shutil.rmtree(old)
        self.say(f"{folder}: {_in_words(recent)}; painted again, colours are {error:.1f} of 255 off")

    def _publish(self, folder: Path) -> None:
        for name in (CONFIG, WEIGHTS, PICTURES):
            _publish(folder / name, self.out / name)


def _in_words(recent: Sequence[Told]) -> str:
    """Of the last steps: means, and how many codes were in use."""
    uses_N = torch.stack([each.uses_N for each in recent]).sum(0)
    loss, l1, perceptual, adversary = (float(np.mean([each[k] for each in recent])) for k in range(4))
    more = f", perceptual {perceptual:.4f}" * bool(perceptual) + f", adversary {adversary:.4f}" * bool(adversary)
    used, num = int((uses_N > 0).sum()), len(uses_N)
    return f"loss {loss:.4f}, L1 {l1:.4f}{more}, {used} of {num} codes in use (perplexity {perplexity(uses_N):.1f})"


def _sheet(trainer: Trainer) -> tuple[Image.Image, float]:
    """Originals above what their codes are painted as, and the mean difference, 0 ... 255."""
    num, crop = len(trainer.pictures), trainer.settings.crop
    chosen = sorted({num * k // SHOWN for k in range(SHOWN)})
    grid = trainer.model.config.pixels_per_code
    images = torch.stack([cut_square(trainer.picture(i), crop, grid) for i in chosen]).to(trainer.device)
    trainer.model.eval()
    painted = torch.cat([trainer.model.decode(trainer.model.encode(image[None])) for image in images])
    trainer.model.train()
    rows = [np.concatenate([to_picture(each) for each in view], axis=1) for view in (images, painted)]
    error = float(np.abs(rows[0].astype(float) - rows[1]).mean())
    return Image.fromarray(np.concatenate(rows)), error


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """All but the model's weights: the optimisers' moments, and the adversary."""
    found = {}
    for name, optimiser in trainer.optimisers.items():
        for number, values in optimiser.state_dict()["state"].items():
            found |= {f"{name}.{number}.{key}": value.cpu().contiguous() for key, value in values.items()}
    if trainer.adversary is not None:
        state = trainer.adversary.state_dict()
        found |= {f"adversary.network.{name}": value.cpu().contiguous() for name, value in state.items()}
    return found


def _restore(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    for name, optimiser in trainer.optimisers.items():
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            which, number, field = key.split(".", 2)
            if which == name and number.isdecimal():
                state.setdefault(int(number), {})[field] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    if trainer.adversary is not None:
        prefix = "adversary.network."
        trainer.adversary.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )


def _publish(source: Path, place: Path) -> None:
    """Give `place` the content of a file that does not change any more; the old one stays until then."""
    partial = place.with_name(f"{PARTIAL}{place.name}")
    partial.unlink(missing_ok=True)
    if place.exists() and place.samefile(source):  # to rename one link to another would leave both
        return
    try:
        os.link(source, partial)
    except OSError:  # a file system without links
        shutil.copyfile(source, partial)
    os.replace(partial, place)
    sync(place.parent)


def _checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in out.glob("step_*") if path.name.removeprefix("step_").isdecimal())


def _newest(out: Path) -> Path | None:
    return next(reversed(_checkpoints(out)), None) if out.is_dir() else None
