"""VQGANs on disk: what is released loads without its framework, ours comes back the same, what is wrong is one line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.files import load_vqgan, save_vqgan
from ofa_ds.vision.vqgan import Vqgan

CONFIG = VqganConfig(
    n_embed=16, embed_dim=8, z_channels=8, resolution=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,)
)


@pytest.fixture
def model() -> Vqgan:
    torch.manual_seed(0)
    return Vqgan(CONFIG).eval()


def release(folder: Path, model: Vqgan, more: dict | None = None, *, content: dict | None = None, **params) -> Path:
    """A directory as taming-transformers leaves it."""
    folder.mkdir()
    names = ("z_channels", "resolution", "ch", "num_res_blocks", "in_channels", "out_ch", "dropout")
    sizes = {name: getattr(CONFIG, name) for name in names} | {"double_z": False}
    sizes |= {"ch_mult": list(CONFIG.ch_mult), "attn_resolutions": list(CONFIG.attn_resolutions)}
    params = {"embed_dim": 8, "n_embed": 16, "ddconfig": sizes} | params
    target = "taming.models.vqgan.GumbelVQ"
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"target": target, "params": params}}))
    content = content or {"state_dict": model.state_dict() | (more or {}), "epoch": 3, "global_step": 10}
    torch.save(content, folder / "last.ckpt")
    return folder


def test_a_model_comes_back_with_the_same_codes_and_pictures(model: Vqgan, tmp_path: Path) -> None:
    save_vqgan(model, tmp_path / "own")
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    again = load_vqgan(tmp_path / "own")
    assert torch.equal(again.encode(image), model.encode(image))
    assert torch.equal(again.decode(again.encode(image)), model.decode(model.encode(image)))
    with pytest.raises(ValueError, match="own: is there already"):
        save_vqgan(model, tmp_path / "own")


def test_a_released_directory_loads_without_its_framework_and_says_what_it_leaves_out(
    model: Vqgan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    framework = types.ModuleType("pytorch_lightning.callbacks")
    framework.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": framework.__name__})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, framework.__name__, framework)
    content = {
        "state_dict": model.state_dict() | {"loss.discriminator.main.0.weight": torch.zeros(3)},
        "callbacks": {framework.ModelCheckpoint: {"best_model_score": torch.tensor(1.0)}},
        "hyper_parameters": framework.ModelCheckpoint(),
    }
    release(tmp_path / "released", model, content=content)
    monkeypatch.undo()
    said: list[str] = []
    loaded = load_vqgan(tmp_path / "released", say=said.append)
    assert "pytorch_lightning" not in sys.modules
    assert loaded.config == CONFIG
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert len(said) == 1 and "1 entries of loss.*" in said[0]


class Command:
    def __reduce__(self) -> tuple:
        return print, ("this must not be printed",)


def test_code_in_a_pickle_is_refused_and_not_run(model: Vqgan, tmp_path: Path, capsys) -> None:
    release(tmp_path / "bad", model, content={"state_dict": model.state_dict(), "callbacks": Command()})
    with pytest.raises(ValueError, match=r"last.ckpt: refused, it holds more than tensors"):
        load_vqgan(tmp_path / "bad")
    assert "must not" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, params, message",
    [
        ({"encoder.conv_in.weight": torch.zeros(1)}, {}, r"encoder.conv_in.weight: want shape \[32, 3, 3, 3\]"),
        (
            {"quantize.proj.bias": torch.full((16,), torch.nan)},
            {},
            "quantize.proj.bias: has values that are not finite",
        ),
        (
            {"other.weight": torch.zeros(1)},
            {},
            "other.weight is no weight of the architecture",
        ),
        ({}, {"n_embed": 32}, r"quantize.proj.weight: want shape \[32, 8, 1, 1\]"),
        ({}, {"n_embed": "many"}, "n_embed: want a whole number"),
        ({}, {"embed_dim": 4}, "z_channels: want embed_dim 4"),
        ({}, {"ddconfig": None}, "model.params.ddconfig: want a table"),
        ({}, {"ddconfig": {"double_z": True}}, "double_z: want false"),
        ({}, {"ddconfig": {"heads": 3}}, "heads: want one of attn_resolutions"),
    ],
)
def test_another_architecture_or_damage_is_one_line(model, tmp_path, more, params, message) -> None:
    release(tmp_path / "bad", model, more, **params)
    with pytest.raises(ValueError, match=message) as error:
        load_vqgan(tmp_path / "bad")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_missing_model_or_an_unfitting_target_is_one_line(model: Vqgan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no VQGAN there: want vqgan.json"):
        load_vqgan(tmp_path)
    folder = release(tmp_path / "other", model)
    (folder / "model.yaml").write_text("model: {target: ldm.models.AutoencoderKL, params: {}}\n")
    with pytest.raises(ValueError, match=r"model.target: want one that ends in GumbelVQ or VQModel"):
        load_vqgan(folder)
    shared = "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 60))  # 2^59 words
    (folder / "model.yaml").write_text(f"a0: &a0 x\n{shared}model: {{target: *a59, params: *a59}}\n")
    with pytest.raises(ValueError, match=r"model.yaml: refused, it has aliases \(\*NAME\)"):
        load_vqgan(folder)
    save_vqgan(model, tmp_path / "own")
    (tmp_path / "own" / "vqgan.json").write_text(json.dumps({"format": "ofa-ds vqgan", "version": 2}))
    with pytest.raises(ValueError, match="version"):
        load_vqgan(tmp_path / "own")


def test_codes_and_sides_that_fit_nothing_are_refused(model: Vqgan) -> None:
    with pytest.raises(ValueError, match="at least 2 pixels"):
        model.encode(torch.zeros(1, 3, 1, 8))
    with pytest.raises(ValueError, match=r"want codes 0 ... 15 of the codebook, got 3 ... 16"):
        model.decode(torch.tensor([[[3, 16]]]))
