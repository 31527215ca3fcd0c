"""Training a VQGAN: it learns, goes on to the same bits, reads every kind of pictures, and tells what is wrong."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
from collections.abc import Callable
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ofa_ds.cli.main import main
from ofa_ds.data import scenes
from ofa_ds.data.building.build import build_shards
from ofa_ds.vision import training, training_run
from ofa_ds.vision.config import VqganConfig, parse_config
from ofa_ds.vision.files import load_vqgan, save_vqgan
from ofa_ds.vision.losses import SLICES, VGG16, Lpips, load_lpips
from ofa_ds.vision.sources import open_pictures
from ofa_ds.vision.training import COLDEST, WARMEST, Settings, Trainer, new_model, perplexity, temperature_at
from ofa_ds.vision.training_run import Start, train_codes
from ofa_ds.vision.vqgan import Vqgan

SIZES = dict(n_embed=16, embed_dim=8, z_channels=8, resolution=16, ch=32, ch_mult=(1, 1), num_res_blocks=1,
             attn_resolutions=())  # fmt: skip
CONFIG = VqganConfig(**SIZES)
CPU = torch.device("cpu")
SETTINGS = dict(num_steps=4, batch=4, side=24, crop=24, lr=2e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six scenes, one of them in a folder inside."""
    path = tmp_path_factory.mktemp("pictures")
    (path / "inside").mkdir()
    for k in range(6):
        scene = scenes.any_scene(scenes.Draw(1, "train", "test", k))
        Image.fromarray(scenes.paint(scene)).save(path / ("inside" if k == 5 else "") / f"{k}.png")
    (path / "notes.txt").write_text("no picture")
    return path


def train(folder: Path, out: Path, start: Start | None = None, **more) -> bool:
    given = {key: more.pop(key) for key in list(more) if key in ("stopped", "say", "save_every")}
    settings = Settings(**(SETTINGS | more))
    return train_codes(
        folder, out, start or Start(config=CONFIG), settings, device="cpu", **({"save_every": 2, "say": print} | given)
    )


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= steps


@pytest.mark.parametrize("quantizer", ["gumbel", "vq"])
def test_it_learns_what_no_one_picture_could_answer_and_what_was_trained_loads(quantizer: str, tmp_path: Path) -> None:
    """Squares of 4 x 4 pixels of black or full colours by chance: any constant picture is off by half the range."""
    (tmp_path / "pictures").mkdir()
    for k in range(24):
        pixels = np.random.default_rng(k).integers(0, 2, (4, 4, 3)).astype(np.uint8) * 255
        Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(tmp_path / f"pictures/{k}.png")
    config, said = dataclasses.replace(CONFIG, n_embed=32, quantizer=quantizer), []
    more = dict(num_steps=40, save_every=20, side=16, crop=16, batch=8, kl_weight=0.0)
    assert train(tmp_path / "pictures", tmp_path / "run", Start(config=config), **more, say=said.append)
    off = [float(line.split("colours are ")[1].split()[0]) for line in said]
    assert len(off) == 2 and off[-1] < 0.8 * 127.5, off
    assert load_vqgan(tmp_path / "run").config == config
    sheet = np.asarray(Image.open(tmp_path / "run" / "pictures.png")).astype(float)
    assert sheet.shape == (32, 8 * 16, 3)
    assert abs(np.abs(sheet[:16] - sheet[16:]).mean() - off[-1]) < 0.06


@pytest.mark.parametrize("more", [{}, {"adversary_weight": 0.8, "adversary_start": 1}], ids=["alone", "adversary"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(folder: Path, tmp_path: Path, more: dict) -> None:
    assert train(folder, tmp_path / "whole", **more)
    assert not train(folder, tmp_path / "parts", **more, stopped=stop_after(3))
    assert (tmp_path / "parts/step_00000003").is_dir()

    def killed() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # after step 4 was computed, before it was saved
        train(folder, tmp_path / "parts", **more, stopped=killed)
    assert not (tmp_path / "parts/step_00000004").exists()
    said: list[str] = []
    assert train(folder, tmp_path / "parts", **more, say=said.append)
    assert "going on from step 3" in said[0]
    for name in ("vqgan.safetensors", "step_00000004/training.safetensors", "pictures.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "parts").glob("step_*")) == ["step_00000003", "step_00000004"]
    assert train(folder, tmp_path / "parts", **more, say=said.append) and "is at step 4 of 4 already" in said[-1]
    assert not list((tmp_path / "parts").glob(".partial_*"))
    with pytest.raises(ValueError, match="was trained with lr 0.002, now it is 0.1; use what it was, or another --out"):
        train(folder, tmp_path / "parts", **more | {"lr": 0.1})


def test_a_damaged_checkpoint_and_a_foreign_directory_are_told(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "run")
    state = tmp_path / "run/step_00000004/training.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="step_00000004: damaged .*; remove it to go on from the one before"):
        train(folder, tmp_path / "run")
    save_vqgan(new_model(CONFIG, 1), tmp_path / "other")
    with pytest.raises(ValueError, match="a VQGAN is there already, without a checkpoint"):
        train(folder, tmp_path / "other")


def test_a_run_among_its_pictures_is_refused(folder: Path) -> None:
    for out in (folder, folder / "inside" / "run"):
        with pytest.raises(ValueError, match="is in .*, which is read; give a place outside of it"):
            train(folder, out)
    assert not list(folder.rglob("step_*"))


def test_the_largest_seed_trains(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "run", seed=(1 << 63) - 1, num_steps=1)


def test_a_run_may_begin_with_another_s_weights(folder: Path, tmp_path: Path) -> None:
    model = new_model(CONFIG, 7)
    save_vqgan(model, tmp_path / "first")
    train(folder, tmp_path / "run", Start(weights_of=tmp_path / "first"), lr=0.0)
    for name, value in load_vqgan(tmp_path / "run").state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_loss_that_is_not_finite_is_told_and_the_way_out_that_is_told_works(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"run: step 1: .* is nan, with --lr 1e\+30; begin again with a smaller one"):
        train(folder, tmp_path / "run", lr=1e30)
    train(folder, tmp_path / "run", num_steps=2)
    with monkeypatch.context() as patch:
        images = Trainer._images
        patch.setattr(Trainer, "_images", lambda self: images(self) * torch.nan)
        with pytest.raises(ValueError, match="run: step 2: the loss of the model is nan, with --lr 0.002; ") as caught:
            train(folder, tmp_path / "run")
    *words, new = str(caught.value).partition("go on with a smaller one: ")[2].split()
    assert words == ["--from", str(tmp_path / "run/step_00000002"), "--out"] and new == "NEW"
    sizes = ["--steps", "1", "--batch", "4", "--side", "24", "--crop", "24", "--lr", "1e-4"]
    assert main(["codes", "train", str(folder), *words, str(tmp_path / "new"), *sizes]) == 0


def test_weights_that_are_not_finite_any_more_are_not_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model_with_infinite_gradients(*given) -> Vqgan:
        model = new_model(*given)
        model.decoder.conv_out.bias.register_hook(lambda gradient: gradient * torch.inf)
        return model

    monkeypatch.setattr(training_run, "new_model", model_with_infinite_gradients)
    with pytest.raises(ValueError, match="run: step 1: decoder.conv_out.bias is not finite any more, with --lr 0.002;"):
        train(folder, tmp_path / "run", save_every=1)
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_the_adversary_s_loss_is_looked_at_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "hinge", lambda real, painted: real.mean() * torch.inf)
    with pytest.raises(ValueError, match="step 0: the loss of the adversary is -?inf"):
        train(folder, tmp_path / "run", adversary_weight=0.8)


def test_what_another_job_ended_with_while_this_one_waited_for_the_directory_is_gone_on_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = training_run.held

    @contextmanager
    def held(out: Path):
        monkeypatch.setattr(training_run, "held", take)
        train(folder, out, num_steps=2)
        with take(out) as lease:
            yield lease

    monkeypatch.setattr(training_run, "held", held)
    said: list[str] = []
    assert train(folder, tmp_path / "run", say=said.append)
    assert "step_00000002: going on from step 2" in said[0]


def test_several_threads_decode_and_only_what_the_step_is_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, steps, crop = threading.Barrier(training._DECODERS, timeout=20), [], Trainer._crop

    def wait(self: Trainer, step: int, at: int) -> torch.Tensor:
        together.wait()
        steps.append(step)
        return crop(self, step, at)

    monkeypatch.setattr(Trainer, "_crop", wait)
    settings = Settings(**SETTINGS | {"batch": training._DECODERS, "num_steps": 9})
    with closing(Trainer(new_model(CONFIG, 1), open_pictures(folder), settings, device=CPU)) as trainer:
        trainer.step = 5
        trainer.train_step()
    assert set(steps) <= {5, 6} and steps.count(5) == training._DECODERS


def test_a_folder_a_tsv_and_shards_give_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    pictures = open_pictures(folder)
    files = [*(folder / f"{k}.png" for k in range(5)), folder / "inside/5.png"]
    lines = [
        f"{k}\t{base64.b64encode(file.read_bytes()).decode()}\t{' '.join('0' * 16)}\n" for k, file in enumerate(files)
    ]
    (tmp_path / "rows.tsv").write_text("".join(lines))
    (tmp_path / "boxes.tsv").write_text(
        "".join(line.rpartition("\t")[0] + "\t0,0,9,9,1,red circle\n" for line in lines[:2])
    )
    parts = {"image": [tmp_path / "rows.tsv"], "detection": [tmp_path / "boxes.tsv"]}
    build_shards(tmp_path / "shards", **parts, workers=1)
    rows, shards = open_pictures(tmp_path / "rows.tsv"), open_pictures(tmp_path / "shards")
    assert len(pictures) == len(rows) == 6 and len(shards) == 8
    for k, file in enumerate(files):
        assert (pictures[k] == np.asarray(Image.open(file))).all()
        assert (rows[k] == pictures[k]).all() and (shards[k] == pictures[k]).all()
    assert (shards[7] == pictures[1]).all() and "detection row 1" in shards.name(7)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda path: None, "no such folder or file"),
        (lambda path: path.mkdir(), "no pictures there; want a folder with"),
        (lambda path: path.write_text(""), "no pictures there"),
        (lambda path: path.write_text("1\n2\n"), r"line \d: want a picture in base64 in column 2"),
        (lambda path: path.write_text("1\tAAAA\n"), "line 1: image: "),
        (lambda path: (path.mkdir(), Image.new("RGB", (9, 1)).save(path / "a.png")), "9 x 1 pixels are less than one"),
        (lambda path: (path.mkdir(), (path / "a.png").write_bytes(b"?")), "a.png: image: "),
    ],
)
def test_pictures_that_are_none_are_told(make: Callable, text: str, tmp_path: Path) -> None:
    make(tmp_path / "given")
    with pytest.raises(ValueError, match=text):
        train(tmp_path / "given", tmp_path / "run")


@pytest.mark.parametrize(
    "more, text",
    [
        ({"crop": 32}, "crop: want at most side 24, got 32"),
        ({"crop": 15}, "crop: want a multiple of 2 pixels, one code's side, got 15"),
        ({"crop": 16, "adversary_weight": 0.8}, "crop: the adversary wants at least 24 pixels, got 16"),
        ({"lr": float("nan")}, "lr: want a number of at least 0, got nan"),
        ({"batch": 0}, "batch: want at least 1, got 0"),
        ({"seed": 1 << 63}, "seed: want less than 2\\^63, as torch's generators take it, got 9223372036854775808"),
    ],
)
def test_settings_that_make_no_run_are_told(folder: Path, tmp_path: Path, more: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        train(folder, tmp_path / "run", **more)


@pytest.mark.parametrize(
    "given, text",
    [
        (["n_embd=8"], "n_embd=8: want KEY=VALUE with a KEY of quantizer, n_embed"),
        (["ch_mult=1,x"], r"ch_mult=1,x: want a value such as \(1, 1, 2, 4\)"),
        (["ch=48"], "ch: want a multiple of 32"),
        (["n_embed"], "n_embed: want KEY=VALUE"),
    ],
)
def test_sizes_that_are_none_are_told(given: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_config(given)


def test_sizes_are_read_from_assignments() -> None:
    assert parse_config([]) == VqganConfig()
    given = ["n_embed=16", "embed_dim=8", "z_channels=8", "resolution=16", "ch=32", "ch_mult=1,1", "num_res_blocks=1"]
    assert parse_config([*given, "attn_resolutions=", "quantizer=gumbel"]) == CONFIG


def test_the_temperature_falls_by_a_cosine_and_perplexity_counts_codes() -> None:
    assert temperature_at(0, 101) == pytest.approx(WARMEST)
    assert temperature_at(50, 101) == pytest.approx((WARMEST + COLDEST) / 2)
    assert temperature_at(100, 101) == temperature_at(1000, 101) == COLDEST
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0])) == pytest.approx(1)


def test_lpips_loads_under_torchvision_s_names_and_under_a_checkpoint_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = {name: torch.randn(1).expand(value.shape).clone() for name, value in Lpips().state_dict().items()}
    of = {str(number): f"net.slice{k + 1}" for k, numbers in enumerate(SLICES) for number in numbers}
    vgg = {f"features.{n}.{part}": wanted[f"{of[str(n)]}.{n}.{part}"] for n, *_ in VGG16 for part in ("weight", "bias")}
    heads = {name: value for name, value in wanted.items() if name.startswith("lin")}
    torch.save(vgg | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    torch.save({"state_dict": {f"loss.perceptual_loss.{k}": v for k, v in wanted.items()}}, tmp_path / "last.ckpt")
    for files in (["vgg16.pth", "vgg.pth"], ["last.ckpt"]):
        found = load_lpips([tmp_path / name for name in files]).state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="vgg16.pth: lin0.model.1.weight is missing; want torchvision's vgg16 with"):
        load_lpips([tmp_path / "vgg16.pth"])
    torch.save(heads | {"lin0.model.1.weight": torch.full((1, 64, 1, 1), torch.nan)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="lin0.model.1.weight: has values that are not finite"):
        load_lpips([tmp_path / "vgg16.pth", tmp_path / "vgg.pth"])


def test_every_term_that_is_asked_for_is_in_the_loss(folder: Path) -> None:
    torch.manual_seed(0)
    settings = Settings(**SETTINGS, kl_weight=0.0, perceptual_weight=0.5)
    lpips = Lpips().eval()
    with closing(Trainer(new_model(CONFIG, 1), open_pictures(folder), settings, device=CPU, lpips=lpips)) as trainer:
        told = trainer.train_step()
    assert told.perceptual != 0 and told.loss == pytest.approx(told.l1 + 0.5 * told.perceptual, rel=1e-6)
    settings = Settings(**SETTINGS, kl_weight=0.0, adversary_weight=0.8, adversary_start=1)
    with closing(Trainer(new_model(CONFIG, 1), open_pictures(folder), settings, device=CPU)) as trainer:
        before, after = trainer.train_step(), trainer.train_step()
    assert before.loss == pytest.approx(before.l1) and before.adversary == 0
    assert after.loss != pytest.approx(after.l1, rel=1e-4) and after.adversary > 0


def test_what_made_the_run_stands_beside_it(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "run", num_steps=2)
    state = json.loads((tmp_path / "run/step_00000002/training.json").read_text())
    assert state["step"] == 2 and state["made_of"]["seed"] == 1 and state["made_of"]["model"]["n_embed"] == 16


def test_the_command_trains_and_tells_wrong_usage(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "n_embed=16 embed_dim=8 z_channels=8 ch=32 ch_mult=1,1 num_res_blocks=1".split()
    command = ["codes", "train", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", "--batch", "2"]
    command += ["--side", "24", "--crop", "16"]
    assert main([*command, *sizes]) == 0
    assert "step_00000001: loss" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/step_00000001/training.json").read_text())["made_of"]["lr"] == 9e-6
    for wrong in (["ch=33"], ["--from", str(tmp_path / "run"), "ch=32"], ["--crop", "99"]):
        assert main([*command, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
