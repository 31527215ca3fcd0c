"""Every preset has exactly the parameters of the original, by name and shape, through one table of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ofa_ds.convert.weights import Weight, entries_of, shapes_of
from ofa_ds.model.config import preset
from ofa_ds.model.names import ALIASES, from_port_name, is_recomputed, to_port_name
from ofa_ds.model.ofa import OFA


@pytest.mark.golden("ofa_*.json")
def test_preset_has_the_parameters_of_the_original(golden_file: Path) -> None:
    manifest = json.loads(golden_file.read_text())
    name = golden_file.stem.removeprefix("ofa_")
    with torch.device("meta"):
        model = OFA(preset(name, vocab_size=manifest["meta"].get("vocab_size", 59457)))
    rename = to_port_name if model.config.use_ofasys else str
    ours = {rename(key): list(value.shape) for key, value in model.state_dict().items()}
    theirs = {
        key: entry["shape"]
        for key, entry in manifest["entries"].items()
        if key not in ALIASES and not is_recomputed(key)
    }
    assert ours == theirs
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["total_params_unique"]
    assert {key: ALIASES[key] for key in manifest["shared"]} == manifest["shared"]


@pytest.mark.golden("official_to_modelscope_names_micro.json")
def test_names_of_the_port(golden_file: Path) -> None:
    table = json.loads(golden_file.read_text())
    assert {official: to_port_name(official) for official in table} == table
    assert {port: from_port_name(port) for port in table.values()} == {port: name for name, port in table.items()}


@pytest.mark.golden("ofa_*.json")
def test_an_exported_file_has_every_entry_of_the_originals_and_no_other(golden_file: Path) -> None:
    """Tied names and recomputed tables too, with their dtypes."""
    manifest = json.loads(golden_file.read_text())
    name = golden_file.stem.removeprefix("ofa_")
    config = preset(name, vocab_size=manifest["meta"].get("vocab_size", 59457))
    parameters, buffers = shapes_of(config)
    dtypes = {key: torch.int64 if key.endswith("num_batches_tracked") else torch.float32 for key in buffers}
    weights = {key: Weight.of(torch.empty(shape, device="meta")) for key, shape in parameters.items()}
    weights |= {key: Weight.of(torch.empty(buffers[key], dtype=dtypes[key], device="meta")) for key in buffers}
    entries = entries_of(config, weights, port=config.use_ofasys)
    ours = {key: (list(entry.shape), str(entry.dtype).removeprefix("torch.")) for key, entry in entries.items()}
    theirs = {key: (entry["shape"], entry["dtype"]) for key, entry in manifest["entries"].items()}
    assert ours == theirs
