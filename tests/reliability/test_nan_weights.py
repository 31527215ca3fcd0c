"""A checkpoint whose weights are not finite is told by who asks it, and what it scores is valid JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import old_checkpoint
import pytest
import torch

from ofa_ds.cli import main
from ofa_ds.inference import loaded_model


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_evaluate_names_the_first_tensor_that_is_not_finite_and_writes_null(tmp_path: Path, monkeypatch, capsys, bad):
    shutil.copytree(old_checkpoint.FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    load, names = loaded_model.load_model_weights, []

    def spoilt(path: Path, *, average: bool) -> dict[str, torch.Tensor]:
        weights = load(path, average=average)
        names[:] = [name for name, each in weights.items() if name.startswith("decoder") and each.is_floating_point()]
        for name in names:
            weights[name].view(-1)[0] = bad
        return weights

    monkeypatch.setattr(loaded_model, "load_model_weights", spoilt)
    code = main(["evaluate", "run", "--shards", "shards", "--rows", "4", "--json", "--task", "caption"])
    out, err = capsys.readouterr()
    assert f"{names[0]} holds NaN or infinite values" in err and code == 0, err
    assert ": null" in out
    json.loads(out, parse_constant=refuse)
