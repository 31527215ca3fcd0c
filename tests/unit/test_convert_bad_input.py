"""Files of other programs that are wrong, odd or dangerous: read as what they mean, or refused in one line."""

from __future__ import annotations

import argparse
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import different, ofa_checkpoint, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ofa_ds.cli import main
from ofa_ds.convert.torch_file import TorchFile
from ofa_ds.model.config import preset

NUMBERS = [np.float64(1.25), np.float32(3), np.float16(2), np.int64(7), np.uint8(200), np.bool_(True), np.str_("loss"),
           np.float64("nan"), np.complex64(1j), np.longdouble(0.5), np.dtype(">i4").type(-5)]  # fmt: skip

TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")


def run(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    ofa_checkpoint(folder / "ours", preset("nano", vocab_size=309))
    assert run("export", folder / "ours", folder / "nano.pt", "--format", "fairseq") == 0
    assert run("export", folder / "ours", folder / "huggingface", "--format", "huggingface") == 0
    return folder


def saved(nano: Path, path: Path, edit) -> Path:
    """nano.pt, edited."""
    content = torch.load(nano / "nano.pt", weights_only=True)
    content["model"] = OrderedDict(content["model"])
    edit(content)
    torch.save(content, path)
    return path


def refused(capsys, *arguments: object) -> str:
    """The one line that an import says, which leaves nothing behind."""
    capsys.readouterr()
    assert run("import", *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("ofa-ds: ") and not Path(str(arguments[1])).exists()
    return error


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{type(number).__name__}-{number}")
def test_numpys_numbers_in_a_torch_file_are_plain_values(tmp_path, number):
    torch.save({"it": number, "dtype": number.dtype, "array": np.array([number] * 3)}, tmp_path / "x.pt")
    found = TorchFile(tmp_path / "x.pt").content["it"]
    assert type(found) in (bool, int, float, complex, str)
    assert found == number or (np.isnan(number) and np.isnan(found))


def test_numpys_numbers_wherever_fairseq_leaves_them_do_not_keep_a_model_out(nano, tmp_path):
    def edit(content):
        content["extra_state"] |= {"best": np.float64(1.25), "val_loss": np.float32(1.3)}
        meter = {"val": np.float32(3.0), "sum": np.float64(3.0), "count": np.int64(1), "round": 3}
        content["extra_state"]["metrics"] = OrderedDict(default=[(10, "loss", "AverageMeter", meter)])
        content["last_optimizer_state"] = {"rng": np.arange(4)}
        content["optimizer_history"][-1]["num_updates"] = np.int64(7)

    assert run("import", saved(nano, tmp_path / "np.pt", edit), tmp_path / "back") == 0
    assert run("import", nano / "nano.pt", tmp_path / "plain") == 0
    assert different(whole(tmp_path / "back"), whole(tmp_path / "plain")) == []


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    "value, word",
    [
        (np.array([1, "x"], dtype=object), "O8"),
        (np.zeros(1, [("a", "f4")])[0], "NumPy"),
        (np.datetime64("2026-11-28"), "NumPy"),
        (Bomb(), "exec"),
        (np.random.default_rng(1), "numpy.random"),
    ],
    ids=["object array", "record", "date", "code", "generator"],
)
def test_numpys_other_values_and_code_are_refused_by_name_and_never_run(nano, tmp_path, capsys, value, word):
    file = saved(nano, tmp_path / "odd.pt", lambda content: content["extra_state"].update(odd=value))
    error = refused(capsys, file, tmp_path / "back")
    assert "refused" in error and word in error


@given(order=st.sampled_from("<>|=!?x"), size=st.integers(0, 40), name=st.text(max_size=20))
def test_a_forged_numpy_value_is_an_error_of_the_unpickler(order, size, name):
    from ofa_ds.convert import numpy_values

    try:
        dtype = numpy_values.Dtype(name)
        dtype.__setstate__((3, order, None, None, None, -1, -1, 0))
        value = numpy_values.scalar(dtype, bytes(size))
    except pickle.UnpicklingError:
        return
    assert isinstance(value, (bool, int, float, complex, bytes, str))


@pytest.mark.parametrize(
    "edit, word",
    [
        (lambda c: c.update(cfg=[1]), "want a dict as cfg, got a list"),
        (lambda c: c["cfg"].update(model="ofa_base"), "want a dict as model, got a str"),
        (lambda c: c.update(extra_state=3), "want a dict as extra_state, got a int"),
        (lambda c: c["extra_state"].update(ema=[1]), "want a dict of tensors"),
        (lambda c: c["model"].update({"encoder.layers.0.fc1.weight": torch.ones(512, 128).int()}), "holds int32"),
        (lambda c: c["model"]["encoder.layers.0.fc1.weight"].fill_(float("nan")), "fc1.weight (weight) holds NaN"),
        (lambda c: c["model"]["encoder.layers.0.fc1.weight"].view(-1)[-1].fill_(float("inf")), "holds NaN or Inf"),
        (lambda c: c["model"].update(dict.fromkeys(TIED, torch.ones(3))), "another rank"),
        (lambda c: c["model"].update({"encoder.prompt.weight": torch.zeros(2, 2)}), "extra 1 (encoder.prompt.weight)"),
        (lambda c: c["cfg"]["model"]["ofa_ds"].update(attn_scale_factor="four"), "attn_scale_factor"),
    ],
)
def test_a_fairseq_file_that_cannot_be_meant_is_refused_in_one_line(nano, tmp_path, capsys, edit, word):
    assert word in refused(capsys, saved(nano, tmp_path / "odd.pt", edit), tmp_path / "back")


def test_what_only_looks_odd_in_a_fairseq_file_is_read(nano, tmp_path):
    def edit(content):
        content["cfg"]["model"] = argparse.Namespace(**content["cfg"]["model"])
        content["optimizer_history"] = []
        content["model"] = OrderedDict((f"module.{name}", value) for name, value in content["model"].items())

    assert run("import", saved(nano, tmp_path / "odd.pt", edit), tmp_path / "back") == 0
    assert run("import", nano / "nano.pt", tmp_path / "plain") == 0
    assert different(whole(tmp_path / "back"), whole(tmp_path / "plain")) == []


@pytest.fixture
def folder(nano, tmp_path) -> Path:
    """A Hugging Face folder in two files with an index."""
    tensors = load_file(nano / "huggingface" / "model.safetensors")
    names = sorted(tensors)
    out = tmp_path / "two"
    out.mkdir()
    (out / "config.json").write_bytes((nano / "huggingface" / "config.json").read_bytes())
    index = {}
    for file, part in (("a.safetensors", names[:50]), ("b.safetensors", names[50:])):
        save_file({name: tensors[name] for name in part}, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return out


def test_a_folder_in_several_files_is_read_by_its_index(folder, nano, tmp_path):
    assert run("import", folder, tmp_path / "back") == 0
    assert run("import", nano / "huggingface", tmp_path / "plain") == 0
    assert different(whole(tmp_path / "back"), whole(tmp_path / "plain")) == []


def rewrite(path: Path, edit) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "edit, word",
    [
        (lambda v: v.update(weight_map=[1]), "want a weight_map"),
        (lambda v: v.update(weight_map={}), "want a weight_map"),
        (lambda v: v["weight_map"].update({"encoder.pos_ln.bias": 3}), "is in '3', want the name of a file"),
        (lambda v: v["weight_map"].update({"encoder.pos_ln.bias": "../a.safetensors"}), "want the name of a file"),
        (lambda v: v["weight_map"].update({"encoder.pos_ln.bias": ".."}), "want the name of a file"),
        (lambda v: v["weight_map"].update({"encoder.pos_ln.bias": "c.safetensors"}), "no such file"),
        (lambda v: v["weight_map"].update({"ghost": "a.safetensors"}), "lists other tensors than it holds: ghost"),
        (lambda v: v["weight_map"].pop("encoder.pos_ln.bias"), "lists other tensors than it holds: encoder.pos_ln"),
    ],
)
def test_an_index_that_is_not_of_its_files_is_refused_in_one_line(folder, tmp_path, capsys, edit, word):
    rewrite(folder / "model.safetensors.index.json", edit)
    assert word in refused(capsys, folder, tmp_path / "back")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 100_000, "{", "[]", "\ufeff{}", ""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_another_program_would_read_otherwise_is_refused_with_its_file(folder, tmp_path, capsys, name, text):
    (folder / name).write_text(text)
    assert name in refused(capsys, folder, tmp_path / "back")


def test_a_tensor_twice_in_a_header_is_refused(nano, folder, tmp_path, capsys):
    raw = (folder / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode()
    name = next(name for name in json.loads(header) if name != "__metadata__")
    entry = json.dumps({name: json.loads(header)[name]})[1:-1]
    twice = f"{header.rstrip()[:-1]},{entry}}}".encode()
    (folder / "a.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + raw[8 + length :])
    assert f"the key '{name}' is there twice" in refused(capsys, folder, tmp_path / "back")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_a_configuration_is_read_or_refused_in_one_line(nano, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("odd")
    for file in (nano / "huggingface").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((nano / "huggingface" / "config.json").read_text())
    where = config["ofa_ds"] if data.draw(st.booleans()) else config
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(VALUES)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    code = run("import", folder, folder / "back")
    assert code in (0, 1) and (folder / "back").exists() == (code == 0)


def test_a_folder_in_two_formats_asks_which_is_meant(nano, folder, tmp_path, capsys):
    (folder / "latest").write_text("global_step1\n")
    error = refused(capsys, folder, tmp_path / "back")
    assert "holds huggingface and deepspeed both" in error and "--format huggingface" in error
    assert run("import", folder, tmp_path / "back", "--format", "huggingface") == 0


def test_a_weight_too_large_for_half_precision_is_not_exported_as_infinite(tmp_path, capsys):
    ofa_checkpoint(tmp_path / "ours", preset("nano", vocab_size=309), scale=1e6)
    assert run("export", tmp_path / "ours", tmp_path / "out", "--format", "huggingface", "--dtype", "float16") == 1
    error = capsys.readouterr().err
    assert "float16" in error and "--dtype bfloat16" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run("export", tmp_path / "ours", tmp_path / "out", "--format", "huggingface", "--dtype", "bfloat16") == 0


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        (3, torch.ones(2), "a tensor has the name 3, want text"),
        ("extra", torch.ones(2).to_sparse(), "'extra' is a sparse tensor"),
        ("extra", torch.ones(2, device="meta"), "'extra' is a meta tensor"),
        ("extra", torch.ones(2, dtype=torch.complex64), "'extra' is a complex tensor"),
    ],
)
def test_a_tensor_that_is_no_plain_one_with_a_name_is_named(nano, tmp_path, capsys, name, tensor, told) -> None:
    path = saved(nano, tmp_path / "odd.pt", lambda content: content["model"].update({name: tensor}))
    assert told in refused(capsys, path, tmp_path / "out")
