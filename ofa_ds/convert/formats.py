"""What each of the other programs' formats is: one table, which finding out, import and export read.

A new format is a name in `terms.FORMATS`, a file with its reader and its writer here, and an entry in `TABLE`. A format
holds weights alone, with names and sizes that the program knows, or a whole training state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ofa_ds.checkpoint.state import ForeignState, Reader
from ofa_ds.convert import fairseq, port
from ofa_ds.convert.deepspeed_folder import read_deepspeed, write_deepspeed
from ofa_ds.convert.foreign import Foreign
from ofa_ds.convert.universal import read_universal, write_universal
from ofa_ds.convert.weights import Weights
from ofa_ds.model.config import ModelConfig


class Beside(NamedTuple):
    """What may go into a file beside the weights."""

    average: Weights | None
    """The moving average of all weights."""
    num_updates: int
    image_size: int


class Target(NamedTuple):
    """The engine that will load a training state."""

    ranks: int
    stage: int
    dtype: torch.dtype
    sub_group_size: int


@dataclass(frozen=True, kw_only=True)
class WeightsFormat:
    """A model, for who trained OFA before."""

    is_here: Callable[[Path], bool]
    """Whether a folder (a file: where `is_file`) is in this format."""
    read: Callable[[Path], Foreign]
    write: Callable[[Path, ModelConfig, Weights, Beside], None]
    """Into a new file, or a new, empty directory to which the tokenizer's files are added."""
    is_file: bool = False
    """One file, with room for the moving average and none for a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class StateFormat:
    """A whole training state, for DeepSpeed."""

    is_here: Callable[[Path], bool]
    read: Callable[[Path], ForeignState]
    write: Callable[[Reader, Path, Target], None]
    is_for_target: bool = True
    """Whether it is cut for one number of ranks, stage and precision."""
    is_file: bool = False


def _is_universal(folder: Path) -> bool:
    return (folder / "latest_universal").is_file() or (folder / "zero").is_dir()


def _is_deepspeed(folder: Path) -> bool:
    return not _is_universal(folder) and ((folder / "latest").is_file() or any(folder.glob("*_states.pt")))


def _is_modelscope(folder: Path) -> bool:
    return (folder / port.MODELSCOPE_CONFIG).is_file()


def _write_fairseq(path: Path, config: ModelConfig, weights: Weights, beside: Beside) -> None:
    fairseq.write_fairseq(path, config, weights, **beside._asdict())


TABLE: dict[str, WeightsFormat | StateFormat] = {
    "deepspeed": StateFormat(
        is_here=_is_deepspeed, read=read_deepspeed,
        write=lambda reader, folder, target: write_deepspeed(reader, folder, **target._asdict()),
    ),
    "universal": StateFormat(
        is_here=_is_universal, read=read_universal, is_for_target=False,
        write=lambda reader, folder, target: write_universal(reader, folder),
    ),
    "huggingface": WeightsFormat(
        is_here=lambda folder: not _is_modelscope(folder) and (folder / port.CONFIG).is_file(), read=port.read_port,
        write=lambda folder, config, weights, beside: port.write_huggingface(folder, config, weights),
    ),
    "fairseq": WeightsFormat(
        is_here=lambda file: file.suffix != ".safetensors", read=fairseq.read_fairseq, write=_write_fairseq,
        is_file=True,
    ),
    "modelscope": WeightsFormat(
        is_here=_is_modelscope, read=port.read_port,
        write=lambda folder, config, weights, beside: port.write_modelscope(
            folder, config, weights, image_size=beside.image_size
        ),
    ),
}  # fmt: skip
"""By the names of terms.FORMATS."""


def those_here(source: Path) -> list[str]:
    """The formats that a file or folder is in, by name; of weights first."""
    found = [name for name, each in TABLE.items() if each.is_file == source.is_file() and each.is_here(source)]
    return sorted(found, key=lambda name: isinstance(TABLE[name], StateFormat))
