"""Hugging Face's and ModelScope's folders: config.json, the weights under the port's names, the tokenizer's files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ofa_ds.checkpoint.tensor_file import TensorFile, bytes_of, spec_of
from ofa_ds.convert import torch_file
from ofa_ds.convert.foreign import Foreign
from ofa_ds.convert.port_config import hints_from_port, to_port
from ofa_ds.convert.weights import Weight, Weights, entries_of
from ofa_ds.model.config import ModelConfig
from ofa_ds.storage import strict_json
from ofa_ds.storage.atomic import sync
from ofa_ds.storage.tensor_writer import TensorWriter

CONFIG = "config.json"
MODELSCOPE_CONFIG = "configuration.json"
WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"
MAX_SHARD_BYTES = 5_000_000_000
"""Larger models become several files and an index, as Hugging Face's own do."""

_FILE_NAME = re.compile(r"[\w.-]+")


def read_port(source: Path) -> Foreign:
    """Either folder. Raises ValueError naming what is missing or wrong."""
    values = _read_json(source / CONFIG)
    weights: dict[str, Weight] = {}
    for path, listed in _weight_files(source).items():
        found = _safetensors(path) if path.suffix == ".safetensors" else _torch_weights(path)
        if listed is not None and found.keys() != listed:
            apart = sorted(found.keys() ^ listed)
            raise ValueError(f"{path}: the index lists other tensors than it holds: {', '.join(apart[:3])}")
        weights |= found
    try:
        hints = hints_from_port(values)
    except ValueError as error:
        raise ValueError(f"{source / CONFIG}: {error}") from error
    return Foreign(origin=str(source), weights=weights, hints=hints, data=_data_fields(source))


def _weight_files(source: Path) -> dict[Path, set[str] | None]:
    """Each file and the tensors that an index lists for it; None where there is no index."""
    for name in (WEIGHTS, TORCH_WEIGHTS):
        index = source / f"{name}.index.json"
        if index.is_file():
            listed: dict[Path, set[str] | None] = {}
            for tensor, file in _weight_map(index).items():
                listed.setdefault(source / file, set()).add(tensor)
            return listed
        if (source / name).is_file():
            return {source / name: None}
    raise ValueError(f"{source}: has neither {WEIGHTS} nor {TORCH_WEIGHTS}, nor an index of several")


def _weight_map(index: Path) -> dict[str, str]:
    found = _read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index}: want a weight_map of tensors to files beside it")
    for tensor, file in found.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file) or file.startswith("."):
            raise ValueError(f"{index}: {tensor} is in {str(file)[:80]!r}, want the name of a file beside it")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index.parent / file}: no such file; {index.name} lists it for {tensor}")
    return found


def _safetensors(path: Path) -> Weights:
    file = TensorFile(path)

    def reader(name: str) -> Weight:
        return Weight(file.entry(name).shape, file.dtype(name), lambda start, numel: file.read(name, start, numel))

    return {name: reader(name) for name in file.names()}


def _torch_weights(path: Path) -> Weights:
    file = torch_file.TorchFile(path)
    return torch_weights(file, file.content)


def torch_weights(file: torch_file.TorchFile, content: Any) -> Weights:
    """The tensors of a flat dict in a file of torch.save. Raises ValueError for anything else."""
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file.path}: want a dict of tensors, got {type(content).__name__} of something else")
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{file.path}: a tensor has the name {name!r:.80}, want text")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
            kind = "complex" if tensor.is_complex() else "meta" if tensor.is_meta else "sparse"
            raise ValueError(f"{file.path}: {name[:80]!r} is a {kind} tensor, want a plain one of real numbers")

    def reader(tensor: torch.Tensor) -> Weight:
        return Weight(tuple(tensor.shape), tensor.dtype, lambda start, n: file.read(tensor, start, n))

    return {name: reader(tensor) for name, tensor in content.items()}


def _data_fields(source: Path) -> dict[str, Any]:
    """ModelScope says at which size of pictures a model was trained."""
    path = source / MODELSCOPE_CONFIG
    model = _read_json(path).get("model", {}) if path.is_file() else {}
    if not isinstance(model, dict):
        raise ValueError(f"{path}: want an object as model, got {model!r:.80}")
    size = model.get("patch_image_size")
    return {"image_size": size} if isinstance(size, int) and size >= 16 else {}


def write_huggingface(directory: Path, config: ModelConfig, weights: Weights) -> None:
    """config.json and model.safetensors into a new, empty directory; several files where one would be over 5 GB."""
    _write_json(directory / CONFIG, to_port(config))
    entries = entries_of(config, weights, port=True, aliases=False)  # safetensors has no shared tensors; code ties them
    shards = list(_shards(entries))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        path = directory / (WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        specs = [spec_of(name, entries[name].dtype, entries[name].shape) for name in names]
        with ThreadPoolExecutor(1) as pool, TensorWriter(path, specs, metadata={"format": "pt"}, pool=pool) as file:
            for name in names:
                for chunk in entries[name].chunks():
                    file.write(bytes_of(chunk))
        index |= dict.fromkeys(names, path.name)
    if len(shards) > 1:
        size = sum(weight.numel * weight.dtype.itemsize for weight in entries.values())
        _write_json(directory / f"{WEIGHTS}.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def write_modelscope(directory: Path, config: ModelConfig, weights: Weights, *, image_size: int) -> None:
    """configuration.json, config.json and pytorch_model.bin into a new, empty directory."""
    _write_json(directory / CONFIG, to_port(config))
    model = {"type": "ofa", "patch_image_size": image_size, "max_image_size": 512}
    content = {"framework": "pytorch", "task": "ofa-pretraining", "model": model}
    _write_json(directory / MODELSCOPE_CONFIG, content)
    torch_file.save(directory / TORCH_WEIGHTS, slots(entries_of(config, weights, port=True)))


def slots(entries: Weights) -> dict[str, torch_file.Slot]:
    """What torch_file.save takes; the same Weight is the same Slot, so tied tensors are stored once."""
    made: dict[Weight, torch_file.Slot] = {}
    for weight in entries.values():
        made.setdefault(weight, torch_file.Slot(weight.shape, weight.dtype, weight.read))
    return {name: made[weight] for name, weight in entries.items()}


def _shards(entries: Weights) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, weight in entries.items():
        num_bytes = weight.numel * weight.dtype.itemsize
        if names and size + num_bytes > MAX_SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = strict_json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: want a JSON object")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sync(path)
