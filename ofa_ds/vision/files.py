"""VQGANs on disk: the released `model.yaml` + `last.ckpt`, and our own `vqgan.json` + `vqgan.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ofa_ds.convert.torch_file import TorchFile
from ofa_ds.storage.atomic import check_space, new_directory, sync
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.vqgan import Vqgan
from ofa_ds.vision.weights import check_weights, read_safetensors

CONFIG, WEIGHTS = "vqgan.json", "vqgan.safetensors"
RELEASED_CONFIG, RELEASED_WEIGHTS = "model.yaml", "last.ckpt"
FORMAT = {"format": "ofa-ds vqgan", "version": 1}

_INERT = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "taming.", "main.")
"""Packages whose classes a released checkpoint may hold beside the weights. None of them is ever imported."""

_MAX_INERT = 64
_LOSS = "loss."
"""Networks that only training used: a perceptual one and a discriminator."""

_QUANTIZERS = {"GumbelVQ": "gumbel", "VQModel": "vq"}
_MAX_YAML_BYTES = 1 << 20


def load_vqgan(folder: Path, *, device: str | torch.device = "cpu", say: Any = print) -> Vqgan:
    """In evaluation mode, fp32. say: is told, one line, what of the file is left out.

    Raises ValueError, one line with the file and what was wanted: no model there, another architecture, parameters
    missing or of another shape, values that are not finite, or code in its pickle.
    """
    if (folder / CONFIG).is_file():
        config, path = _read_config(folder / CONFIG), folder / WEIGHTS
        weights = {name: value.float() for name, value in read_safetensors(path).items()}
    elif (folder / RELEASED_CONFIG).is_file():
        config, path = _released_config(folder / RELEASED_CONFIG), folder / RELEASED_WEIGHTS
        weights = _released_weights(path, say)
    else:
        raise ValueError(
            f"{folder}: no VQGAN there: want {CONFIG} and {WEIGHTS}, or the released {RELEASED_CONFIG} and "
            f"{RELEASED_WEIGHTS}"
        )
    with torch.device("meta"):
        model = Vqgan(config)
    check_weights(path, model, weights, "the architecture that its configuration says")
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)


def model_files(folder: Path) -> list[Path]:
    """Those of which `load_vqgan` reads a model."""
    own = (folder / CONFIG).is_file()
    return [folder / name for name in ((CONFIG, WEIGHTS) if own else (RELEASED_CONFIG, RELEASED_WEIGHTS))]


def save_vqgan(model: Vqgan, folder: Path) -> None:
    """A new directory of our own form, there when it is complete.

    Raises ValueError where something is there, OSError where the disk has no room for it.
    """
    with new_directory(folder) as partial:
        write_vqgan(model, partial)


def write_vqgan(model: Vqgan, folder: Path) -> None:
    """The files of our own form into a directory that is not seen yet; they are durable then. Raises OSError."""
    weights = {name: value.detach().cpu().float().contiguous() for name, value in model.state_dict().items()}
    check_space(folder, sum(value.nbytes for value in weights.values()), 2)  # safetensors tells it in its own way
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(FORMAT | dataclasses.asdict(model.config), indent=1)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        sync(folder / name)


def _read_config(path: Path) -> VqganConfig:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy or make it again") from error
    if not isinstance(found, dict) or {key: found.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"{path}: want {FORMAT}; make it with this version of ofa-ds")
    return _config(path, {key: value for key, value in found.items() if key not in FORMAT})


def _config(path: Path, sizes: Mapping[str, Any]) -> VqganConfig:
    known = {each.name for each in dataclasses.fields(VqganConfig)}
    if unknown := sorted(set(sizes) - known):
        raise ValueError(f"{path}: {unknown[0]}: want one of {', '.join(sorted(known))}")
    lists = {key: tuple(sizes[key]) for key in ("ch_mult", "attn_resolutions") if isinstance(sizes.get(key), list)}
    try:
        return VqganConfig(**(dict(sizes) | lists))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _released_config(path: Path) -> VqganConfig:
    """Of taming-transformers' `model.yaml`: model.target, model.params.{n_embed, embed_dim, ddconfig}."""
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a {RELEASED_CONFIG}")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # a few bytes could say 2^n values
            raise ValueError(f"{path}: refused, it has aliases (*NAME); a {RELEASED_CONFIG} has none")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    model = _part(path, found, "model")
    target = str(model.get("target", ""))
    quantizer = _QUANTIZERS.get(target.rpartition(".")[2])
    if quantizer is None:
        raise ValueError(f"{path}: model.target: want one that ends in {' or '.join(_QUANTIZERS)}, got {target!r}")
    params = _part(path, model, "params", "model.")
    sizes = dict(_part(path, params, "ddconfig", "model.params."))
    if sizes.pop("double_z", False):
        raise ValueError(
            f"{path}: model.params.ddconfig.double_z: want false, as of a VQGAN, got true (an autoencoder)"
        )
    return _config(path, sizes | {key: params.get(key) for key in ("n_embed", "embed_dim")} | {"quantizer": quantizer})


def _part(path: Path, found: Any, key: str, before: str = "") -> Mapping[str, Any]:
    part = found.get(key) if isinstance(found, dict) else None
    if not isinstance(part, dict):
        raise ValueError(f"{path}: {before}{key}: want a table, got {part!r:.60}")
    return part


def _released_weights(path: Path, say: Any) -> dict[str, Tensor]:
    """The entries of `state_dict` but the losses'. Classes of known packages become inert ones; no other is built."""
    found = _released_file(path).content
    state = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: want the weights under state_dict, as Lightning keeps them")
    bad = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if bad is not None:
        raise ValueError(f"{path}: state_dict: {bad}: want a tensor")
    left_out = [name for name in state if str(name).startswith(_LOSS)]
    if left_out:
        say(f"{path}: {len(left_out)} entries of {_LOSS}* are left out: only training used them")
    return {name: value.float() for name, value in state.items() if name not in left_out}


def _released_file(path: Path) -> TorchFile:
    allow: list[tuple[type, str]] = []
    while True:
        try:
            return TorchFile(path, allow)
        except ValueError as error:
            name = str(error).rpartition(" ")[2]
            known = ": a " in str(error) and name.startswith(_INERT) and name not in {each[1] for each in allow}
            if not known or len(allow) == _MAX_INERT:
                raise
        allow.append((type("Inert", (_Inert,), {}), name))


class _Inert:
    """Stands for an object of the training framework: it takes anything, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass
