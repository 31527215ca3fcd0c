"""Other programs' formats: every tensor comes back bit for bit, every name is accounted for, nothing is filled in."""

from __future__ import annotations

import argparse
import json
import pathlib
from pathlib import Path

import pytest
import torch
from checkpoints import different, ofa_checkpoint, whole
from safetensors.torch import load_file, save_file

from ofa_ds import terms
from ofa_ds.checkpoint.manifest import read_manifest
from ofa_ds.checkpoint.tensor_file import TensorFile
from ofa_ds.checkpoint.verifying import describe, verify
from ofa_ds.cli import main
from ofa_ds.config import recipe_from_dict
from ofa_ds.convert import port
from ofa_ds.convert.architecture import architecture
from ofa_ds.convert.formats import TABLE, WeightsFormat
from ofa_ds.data.vocab import train_vocab
from ofa_ds.model.config import ModelConfig, ResNetConfig, ViTConfig, model_config, preset

RESNET = ModelConfig(
    dim=32, ffn_dim=64, num_heads=4, encoder_layers=2, decoder_layers=2, backbone=ResNetConfig(depths=(1, 2, 1)),
    vocab_size=309, max_positions=64, token_bucket_size=8, image_bucket_size=6, code_image_size=32,
)  # fmt: skip
VIT = ViTConfig(resolution=28, patch_size=14, channels=32, layers=2, heads=4)
CONFIGS = {
    "resnet": RESNET,
    "nano": preset("nano", vocab_size=309),
    "6b": ModelConfig(
        dim=32, ffn_dim=64, num_heads=4, encoder_layers=2, decoder_layers=2, backbone=VIT, vocab_size=309,
        max_positions=64, token_bucket_size=8, image_bucket_size=6, use_ofasys=True, disable_entangle=False,
        share_attn_bias=True, gamma=0.5,
    ),
}  # fmt: skip
FORMATS = ("huggingface", "fairseq", "modelscope")


def test_every_format_by_name_has_an_entry():
    assert tuple(TABLE) == terms.FORMATS
    assert {name for name, kind in TABLE.items() if isinstance(kind, WeightsFormat)} == set(FORMATS)


def run(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in whole(path).items() if name.startswith(("weight|", "buffer|"))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    for name, config in CONFIGS.items():
        ofa_checkpoint(folder / name, config)
    return {name: folder / name for name in CONFIGS}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_out_and_in_again_is_the_same_model_bit_for_bit(saved, tmp_path, name, kind):
    assert run("export", saved[name], tmp_path / "out", "--format", kind) == 0
    assert run("import", tmp_path / "out", tmp_path / "back", "--ranks", 3) == 0
    assert different(weights_of(tmp_path / "back"), weights_of(saved[name])) == []
    assert verify(tmp_path / "back") == [] and describe(tmp_path / "back")["kinds"] == ["weight"]
    recipe = recipe_from_dict(read_manifest(tmp_path / "back").recipe)
    assert architecture(model_config(recipe, 309)) == architecture(CONFIGS[name])


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_any_pair_of_formats_keeps_every_bit(saved, tmp_path, first, second):
    assert run("export", saved["resnet"], tmp_path / "1", "--format", first) == 0
    assert run("import", tmp_path / "1", tmp_path / "2") == 0
    assert run("export", tmp_path / "2", tmp_path / "3", "--format", second) == 0
    assert run("import", tmp_path / "3", tmp_path / "4", "--format", second) == 0
    assert different(weights_of(tmp_path / "4"), weights_of(saved["resnet"])) == []


def test_fairseq_file_has_what_fairseq_asks_for(saved, tmp_path):
    assert run("export", saved["resnet"], tmp_path / "ofa.pt", "--format", "fairseq") == 0
    content = torch.load(tmp_path / "ofa.pt", weights_only=True)
    assert {"args", "cfg", "model", "criterion", "optimizer_history", "task_state", "extra_state"} == content.keys()
    model = content["model"]
    assert model["encoder.version"].item() == 3.0 and model["decoder.token_rp_bucket"].dtype == torch.int64
    owner = model["encoder.embed_tokens.weight"]
    for alias in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        assert model[alias].data_ptr() == owner.data_ptr(), "tied matrices are stored once"
    assert content["cfg"]["model"]["encoder_embed_dim"] == 32 and content["cfg"]["model"]["disable_entangle"] is True
    assert content["optimizer_history"][-1]["num_updates"] == 7
    assert (tmp_path / "ofa.pt").stat().st_size < sum(t.numel() * t.element_size() for t in model.values())


def test_huggingface_folder_is_plain_safetensors_with_the_ports_names(saved, tmp_path):
    assert run("export", saved["resnet"], tmp_path / "hf", "--format", "huggingface", "--dtype", "bfloat16") == 0
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["encoder.layers.0.self_attn_mid_layer_norm.weight"].dtype == torch.bfloat16
    assert tensors["encoder.embed_images.bn1.num_batches_tracked"].item() == 41
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["d_model"], config["vocab_size"]) == ("ofa", 32, 309)


def test_a_large_model_becomes_several_files_and_an_index(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(port, "MAX_SHARD_BYTES", 400_000)
    assert run("export", saved["nano"], tmp_path / "hf", "--format", "huggingface") == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert run("import", tmp_path / "hf", tmp_path / "back") == 0
    assert different(weights_of(tmp_path / "back"), weights_of(saved["nano"])) == []


def test_the_moving_average_goes_to_fairseq_and_back_and_may_be_taken_as_the_weights(tmp_path):
    ofa_checkpoint(tmp_path / "ours", RESNET, kinds=("weight", "exp_avg", "exp_avg_sq", "ema"))
    assert run("export", tmp_path / "ours", tmp_path / "ofa.pt", "--format", "fairseq") == 0
    assert run("import", tmp_path / "ofa.pt", tmp_path / "back") == 0
    ours = {name: tensor for name, tensor in whole(tmp_path / "ours").items() if "exp_avg" not in name}
    assert different(whole(tmp_path / "back"), ours) == []
    assert run("import", tmp_path / "ofa.pt", tmp_path / "taken", "--ema") == 0
    averaged = {name.replace("ema_buffer", "buffer").replace("ema|", "weight|"): tensor
                for name, tensor in ours.items() if name.startswith("ema")}  # fmt: skip
    assert different(whole(tmp_path / "taken"), averaged) == []
    assert run("export", tmp_path / "ours", tmp_path / "averaged", "--format", "huggingface", "--ema") == 0
    assert run("import", tmp_path / "averaged", tmp_path / "again") == 0
    assert different(whole(tmp_path / "again"), averaged) == []


def test_an_export_to_deepspeed_says_that_the_moving_average_stays_behind(tmp_path, capsys):
    ofa_checkpoint(tmp_path / "averaged", CONFIGS["nano"], kinds=("weight", "exp_avg", "exp_avg_sq", "ema"))
    assert run("export", tmp_path / "averaged", tmp_path / "out", "--format", "universal") == 0
    assert "without the moving average" in capsys.readouterr().out


def test_the_tokenizers_files_travel_with_the_weights(tmp_path):
    vocab = train_vocab(["a cat sat on a mat"] * 3, 260, tmp_path / "vocab", num_codes=16, num_bins=12)
    config = preset("nano", vocab_size=vocab.size)
    ofa_checkpoint(tmp_path / "ours", config)
    manifest_vocab = ["--vocab", tmp_path / "vocab"]
    assert run("export", tmp_path / "ours", tmp_path / "1", "--format", "fairseq") == 0
    assert run("import", tmp_path / "1", tmp_path / "2", *manifest_vocab) == 0
    assert describe(tmp_path / "2")["identity"]["vocab"] == vocab.fingerprint
    assert run("export", tmp_path / "2", tmp_path / "3", "--format", "huggingface") == 0
    assert run("import", tmp_path / "3", tmp_path / "4") == 0
    assert describe(tmp_path / "4")["identity"]["vocab"] == vocab.fingerprint


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def exported(saved, tmp_path) -> Path:
    assert run("export", saved["resnet"], tmp_path / "hf", "--format", "huggingface") == 0
    return tmp_path / "hf"


def test_a_missing_and_an_extra_name_are_both_listed_with_the_preset_that_fits_best(exported, tmp_path, capsys):
    def edit(tensors):
        del tensors["encoder.layers.1.fc2.bias"]
        tensors["classification_heads.vqa.weight"] = torch.zeros(3)

    change(exported, edit)
    assert run("import", exported, tmp_path / "back") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not (tmp_path / "back").exists()
    assert "missing 1 (encoder.layers.1.fc2.bias)" in message and "extra 1 (classification_heads.vqa.weight)" in message
    assert "fits best is" in message
    assert list(tmp_path.glob(".*")) == []


def test_missing_names_start_fresh_only_where_that_is_allowed(exported, saved, tmp_path):
    def edit(tensors):
        for name in list(tensors):
            if "mid_layer_norm" in name or "c_attn" in name and "cross" in name or name.endswith("layers.0.fc1.weight"):
                del tensors[name]
        tensors["prompt.weight"] = torch.ones(2)

    change(exported, edit)
    allowed = ["--allow-missing", "*attn_ln*", "--allow-missing", "*c_attn", "--allow-missing", "*fc1.weight"]
    assert run("import", exported, tmp_path / "no", *allowed) == 1
    assert run("import", exported, tmp_path / "back", *allowed, "--drop", "prompt.*") == 1  # sizes are read from fc1
    change(exported, lambda tensors: tensors.update({"encoder.layers.0.fc1.weight": torch.ones(64, 32)}))
    assert run("import", exported, tmp_path / "back", *allowed, "--drop", "prompt.*") == 0
    found, original = weights_of(tmp_path / "back"), weights_of(saved["resnet"])
    assert torch.equal(found["weight|encoder.layers.1.attn_ln.weight"], torch.ones(32))
    assert torch.equal(found["weight|decoder.layers.1.encoder_attn.c_attn"], torch.ones(4))
    assert 0.01 < found["weight|decoder.layers.0.fc1.weight"].std() < 0.03
    assert torch.equal(found["weight|encoder.layers.1.fc2.bias"], original["weight|encoder.layers.1.fc2.bias"])


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.update({"decoder.embed_tokens.weight": t["encoder.embed_tokens.weight"] + 1}), "OFA ties them"),
        (lambda t: t["encoder.token_rp_bucket"].add_(1), "bucket rule"),
        (lambda t: t.update({"decoder.pos_ln.weight": torch.ones(31)}), "is [31], want [32]"),
        (lambda t: t.pop("encoder.embed_tokens.weight"), "sizes are read from"),
        (lambda t: t.update({"model.encoder.pos_ln.bias": torch.ones(32)}), "twice"),
    ],
)
def test_what_is_no_ofa_is_refused_in_one_line(exported, tmp_path, capsys, edit, message):
    change(exported, edit)
    assert run("import", exported, tmp_path / "back") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "back").exists()


def test_names_with_a_wrappers_prefix_are_understood(exported, saved, tmp_path):
    def edit(tensors):
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    change(exported, edit)
    assert run("import", exported, tmp_path / "back") == 0
    assert different(weights_of(tmp_path / "back"), weights_of(saved["resnet"])) == []


def test_scales_called_gamma_are_the_ports_weights(saved, tmp_path):
    """Old files of the 6B have names that a loader renamed later (docs/ofa.md, Foreign files)."""
    assert run("export", saved["6b"], tmp_path / "hf", "--format", "huggingface") == 0

    def edit(tensors):
        for name in [name for name in tensors if "weight_" in name]:
            tensors[name.replace("weight_", "gamma_")] = tensors.pop(name)

    change(tmp_path / "hf", edit)
    assert any("gamma_cross_attn" in name for name in load_file(tmp_path / "hf" / "model.safetensors"))
    assert run("import", tmp_path / "hf", tmp_path / "back") == 0
    assert different(weights_of(tmp_path / "back"), weights_of(saved["6b"])) == []


def test_a_configuration_that_is_no_ofa_is_refused(exported, tmp_path, capsys):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"normformer": False}))
    assert run("import", exported, tmp_path / "back") == 1
    assert "normformer = False" in capsys.readouterr().err


def test_old_files_with_args_and_half_precision_are_read(saved, tmp_path):
    assert run("export", saved["resnet"], tmp_path / "ofa.pt", "--format", "fairseq", "--dtype", "float16") == 0
    content = torch.load(tmp_path / "ofa.pt", weights_only=True)
    content["args"], content["cfg"] = argparse.Namespace(**content["cfg"]["model"], patch_image_size=224), None
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert run("import", tmp_path / "old.pt", tmp_path / "back") == 0
    halves = {
        name: t.half().float() if name.startswith("weight|") else t for name, t in weights_of(saved["resnet"]).items()
    }
    assert different(weights_of(tmp_path / "back"), halves) == []
    assert read_manifest(tmp_path / "back").recipe["data"]["image_size"] == 224


def test_a_file_that_runs_code_is_refused(saved, tmp_path, capsys):
    torch.save({"model": {}, "cfg": pathlib.PurePosixPath("x")}, tmp_path / "bad.pt")
    assert run("import", tmp_path / "bad.pt", tmp_path / "back") == 1
    error = capsys.readouterr().err
    assert "refused" in error and "pathlib" in error and error.count("\n") == 1
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint at all")
    assert run("import", tmp_path / "noise.pt", tmp_path / "back") == 1
    assert "noise.pt" in capsys.readouterr().err


def test_an_index_that_leads_out_of_its_folder_is_refused(exported, tmp_path, capsys):
    (exported / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"encoder.pos_ln.bias": "../elsewhere.safetensors"}}
    (exported / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("import", exported, tmp_path / "back") == 1
    assert "beside it" in capsys.readouterr().err


def test_vocabulary_grows_by_name_and_old_rows_stay(saved, exported, tmp_path):
    assert run("import", exported, tmp_path / "back", "--grow-vocab", 400) == 0
    found, before = (
        weights_of(path)["weight|encoder.embed_tokens.weight"] for path in (tmp_path / "back", saved["resnet"])
    )
    assert found.shape == (400, 32) and torch.equal(found[:309], before)
    assert 0.12 < found[309:].std() < 0.24  # 32 ** -0.5 = 0.177
    assert run("import", exported, tmp_path / "less", "--grow-vocab", 300) == 1


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--grow-vocab", 10**12, "vocab_size"), ("--image-positions", 10**6, "image_bucket_size")],
)
def test_a_table_that_no_model_may_have_is_refused_before_it_is_made(option, value, named, exported, tmp_path, capsys):
    assert run("import", exported, tmp_path / "back", option, value) == 1
    told = capsys.readouterr().err
    assert f"model: {named}: " in told and str(value) in told and "unforeseen" not in told and told.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_picture_positions_are_interpolated_by_name(saved, exported, tmp_path):
    assert run("import", exported, tmp_path / "back", "--image-positions", 12) == 0
    found, before = weights_of(tmp_path / "back"), weights_of(saved["resnet"])
    table, old = (each["weight|encoder.embed_image_positions.weight"] for each in (found, before))
    assert table.shape == (145, 32) and torch.equal(table[0], old[0])
    centre = table[1:].reshape(12, 12, 32)[4:8, 4:8].mean((0, 1))
    assert torch.allclose(centre, old[1:].reshape(6, 6, 32)[2:4, 2:4].mean((0, 1)), atol=0.2)
    relative = found["weight|encoder.image_rel_pos_table_list.0.weight"]
    assert relative.shape == (23 * 23 + 3, 4)
    assert torch.equal(relative[-3:], before["weight|encoder.image_rel_pos_table_list.0.weight"][-3:])
    assert run("export", tmp_path / "back", tmp_path / "pt", "--format", "fairseq") == 0, "it is a model of its own now"


def test_nothing_is_overwritten(saved, exported, tmp_path, capsys):
    assert run("export", saved["resnet"], exported, "--format", "huggingface") == 1
    assert "is there already" in capsys.readouterr().err
    assert run("import", saved["resnet"], tmp_path / "back") == 1
    assert "checkpoint of ofa-ds already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["huggingface", "modelscope", "fairseq"])
def test_a_damaged_weight_is_not_exported(tmp_path, capsys, kind):
    ofa_checkpoint(tmp_path / "ours", RESNET)
    file = TensorFile(tmp_path / "ours" / "rank_00001.safetensors")
    weights = [name for name in file.names() if name.startswith("weight|")]
    raw = file.path.read_bytes()
    for name in (weights[0], weights[len(weights) // 2], weights[-1]):
        for at in (file.entry(name).start, file.entry(name).end - 1):
            damaged = bytearray(raw)
            damaged[file.begin + at] ^= 1
            file.path.write_bytes(damaged)
            assert run("export", tmp_path / "ours", tmp_path / "out", "--format", kind) == 1
            assert f"rank_00001.safetensors: {name} has checksum" in capsys.readouterr().err
            assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_damaged_moment_does_not_keep_a_model_from_being_exported(tmp_path):
    ofa_checkpoint(tmp_path / "ours", RESNET)
    file = TensorFile(tmp_path / "ours" / "rank_00001.safetensors")
    moment = next(name for name in file.names() if name.startswith("exp_avg|"))
    raw = bytearray(file.path.read_bytes())
    raw[file.begin + file.entry(moment).start] ^= 1
    file.path.write_bytes(raw)
    assert run("export", tmp_path / "ours", tmp_path / "out", "--format", "huggingface") == 0
