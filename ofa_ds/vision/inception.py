"""FID and the Inception score through torch-fidelity, with weights and a reference that the user names.

Legend: N pictures, D = 2048 features, K = 1008 classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ofa_ds.convert.torch_file import TorchFile
from ofa_ds.progress import Progress
from ofa_ds.vision.libraries import library
from ofa_ds.vision.sources import open_pictures

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity would download."""
FEATURES, LOGITS = "2048", "logits_unbiased"
BATCH = 32
MIN_PICTURES = 2048
"""As many as there are features; with fewer the covariance has no full rank and FID is too large."""
SPLITS = 10
"""Of the Inception score: the mean over so many parts, whose pictures are drawn with torch-fidelity's seed."""

_WHAT = "FID and the Inception score"


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


class Inception:
    """InceptionV3 as FID was defined with: TensorFlow's of 2015."""

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        """Raises ValueError, one line: torch-fidelity is missing, no such file, another network, code in the file."""
        network = library("torch_fidelity.feature_extractor_inceptionv3", _WHAT).FeatureExtractorInceptionV3
        try:
            self._model: Any = network("inception-v3-compat", [FEATURES, LOGITS], _checked(path))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path}: not the weights of torch-fidelity's {WEIGHTS}: {reason}") from error
        self._model.to(device)
        self.device = torch.device(device)

    def features(self, pictures: Iterable[np.ndarray]) -> tuple[Tensor, Tensor]:
        """uint8 RGB [H, W, 3] -> features [N, D], logits without bias [N, K]; each is resized as TensorFlow did."""
        found: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            for part in _batches(pictures):
                batch_N3HW = torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).to(self.device)
                found.append(tuple(each.cpu() for each in self._model(batch_N3HW)))
        features, logits = zip(*found, strict=True) if found else ((torch.empty(0, 2048),), (torch.empty(0, 1008),))
        return torch.cat(features), torch.cat(logits)


def _batches(pictures: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """At most BATCH of one size, in order."""
    for _, alike in groupby(pictures, key=lambda picture: picture.shape):
        while part := list(islice(alike, BATCH)):
            yield part


def _checked(path: Path) -> io.BytesIO:
    """The weights, read without running anything, as the file that torch-fidelity reads: it would run what is there."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; want torch-fidelity's {WEIGHTS}")
    weights = TorchFile(path).content
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path}: want a state dict of tensors, as torch-fidelity's {WEIGHTS}")
    for name, shape in {"Conv2d_1a_3x3.conv.weight": [32, 3, 3, 3], "fc.weight": [1008, 2048]}.items():
        if name not in weights or list(weights[name].shape) != shape:
            raise ValueError(f"{path}: {name}: want shape {shape}, as of torch-fidelity's {WEIGHTS}")
    if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{path}: {bad[0]}: has values that are not finite; copy it again")
    data = io.BytesIO()
    torch.save(weights, data)
    data.seek(0)
    return data


def statistics(features_ND: Tensor) -> Statistics:
    """Raises ValueError for fewer than two pictures."""
    if len(features_ND) < 2:
        raise ValueError(f"FID: want at least 2 pictures, got {len(features_ND)}")
    found = library("torch_fidelity.metric_fid", _WHAT).fid_features_to_statistics(features_ND.double())
    return Statistics(found["mu"], found["sigma"])


class Reference:
    """What FID compares with: a folder, TSV or shards of pictures, or an .npz with `mu` and `sigma`, as OFA's."""

    def __init__(self, path: Path) -> None:
        """Looks at no picture yet. Raises ValueError, one line: none there, an .npz with something else."""
        self._path, self._found = path, _stored(path) if path.suffix == ".npz" else None
        self._pictures = open_pictures(path) if self._found is None else None

    def statistics(self, inception: Inception) -> Statistics:
        """Those of pictures are computed when they are first asked for, which takes its time."""
        if self._found is None:
            self._found = self._looked_at(inception)
        return self._found

    def _looked_at(self, inception: Inception) -> Statistics:
        pictures, features = self._pictures, []
        with closing(Progress(len(pictures), f"looking at {self._path.name}", "pictures")) as progress:
            for start in range(0, len(pictures), BATCH):
                part = [pictures[k] for k in range(start, min(start + BATCH, len(pictures)))]
                features.append(inception.features(part)[0])
                progress.add(len(part))
        return statistics(torch.cat(features))


def _stored(path: Path) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as found:
            mu, sigma = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path}: want an .npz with mu and sigma of features: {str(error).splitlines()[0]}") from error
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        raise ValueError(f"{path}: want mu [2048] and sigma [2048, 2048], got {list(mu.shape)} and {list(sigma.shape)}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: has values that are not finite; copy it again")
    return Statistics(mu, sigma)


def fid(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two Gaussians: |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) (Heusel et al. 2017)."""
    metric = library("torch_fidelity.metric_fid", _WHAT)
    found = metric.fid_statistics_to_metric(
        {"mu": a.mu, "sigma": a.sigma}, {"mu": b.mu, "sigma": b.sigma}, verbose=False
    )
    return float(found["frechet_inception_distance"])


def inception_score(logits_NK: Tensor) -> tuple[float, float]:
    """Mean and deviation over SPLITS parts of exp(mean KL(p(y|x) || p(y))). Raises ValueError for fewer than SPLITS."""
    if len(logits_NK) < SPLITS:
        raise ValueError(f"Inception score: want at least {SPLITS} pictures, got {len(logits_NK)}")
    found = library("torch_fidelity.metric_isc", _WHAT).isc_features_to_metric(logits_NK, splits=SPLITS)
    return float(found["inception_score_mean"]), float(found["inception_score_std"])
