"""A manifest is what its files say, or refused: nobody who edits one gets other tensors, a traceback or a hang."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from checkpoints import state_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ofa_ds.checkpoint.format import FORMAT, KINDS, MANIFEST, MAX_RANKS
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.loading import load_model_weights, open_stream
from ofa_ds.checkpoint.manifest import FormatVersionError, read_manifest, write_document
from ofa_ds.checkpoint.reshard import reshard
from ofa_ds.checkpoint.verifying import verify
from ofa_ds.cli import main
from ofa_ds.storage import safetensors_file
from ofa_ds.storage.safetensors_file import DamagedError

GENERATOR = torch.Generator().manual_seed(3)
TENSORS = {name: torch.randn(shape, generator=GENERATOR) for name, shape in (("a", (5, 3)), ("b", (15,)), ("c", ()))}
EXTRA = {"recipe": {"model": {"preset": "nano"}}, "identity": {"data": None, "vocab": "v"}, "origin": {"ranks": 2}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two ranks; one cut evenly, one as ZeRO stage 2 cuts."""
    folder = tmp_path_factory.mktemp("manifest")
    buffers = {"seen": torch.tensor(9), "mean": torch.randn(4, generator=GENERATOR)}
    kinds = {"a": KINDS, "b": KINDS[:3], "c": KINDS[:1]}
    for stage in (2, 3):
        state = state_of(TENSORS, kinds=kinds, buffers=buffers, extra=EXTRA)
        write_checkpoint(folder / str(stage), state, ranks=2, stage=stage)
    return folder


def document_of(directory: Path) -> dict[str, Any]:
    document = json.loads((directory / MANIFEST).read_text())
    del document["xxh3_128"]
    return document


def with_manifest(folder: Path, directory: Path, document: dict[str, Any]) -> Path:
    """The files of a checkpoint beside another manifest, whose checksum is right."""
    folder.mkdir(exist_ok=True)
    for file in directory.glob("*.safetensors"):
        if not (folder / file.name).exists():
            os.link(file, folder / file.name)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_document(folder / MANIFEST, document)
    return folder


VALUES = st.sampled_from([
    None, True, False, -1, 0, 1, 2, 3, 16, 10**15, 2**63, 10**400, 0.0, 1.5, -1e300, "", "even", "a", "x\ny", "\ud800",
    "../x", [], [[]], [0, 0, 15], [[0, 0, 8], [1, 8, 7]], [3, 5], [15], ["weight"], ["weight", "ema"], {}, {"a": {}},
    {"": 1}, [[[[[[]]]]]] * 9,
])  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """One or two places of the tree with another value, without a value, with one more, or in another order."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        node: Any = changed
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            action = draw(st.sampled_from(["down", "down", "down", "down", "replace", "delete", "add", "turn"]))
            if not keys or action == "add":
                if isinstance(node, dict):
                    node[draw(st.sampled_from(["new", "weight", "loss_scaler", "a"]))] = copy.deepcopy(draw(VALUES))
                else:
                    node.append(copy.deepcopy(draw(VALUES)))
                break
            key = draw(st.sampled_from(keys))
            if action == "delete":
                del node[key]
                break
            if action == "turn":
                items = list(node.items())[::-1] if isinstance(node, dict) else node[::-1]
                node.clear()
                node.update(items) if isinstance(node, dict) else node.extend(items)
                break
            if action == "replace" or not isinstance(node[key], (dict, list)):
                node[key] = copy.deepcopy(draw(VALUES))
                break
            node = node[key]
    return changed


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), stage=st.sampled_from([2, 3]))
def test_an_edited_manifest_is_refused_in_one_line_or_means_what_it_says(saved, data, stage):
    original = document_of(saved / str(stage))
    document = data.draw(mutations(original))
    directory = with_manifest(saved / f"edited_{stage}", saved / str(stage), document)
    try:
        manifest = read_manifest(directory)
    except (DamagedError, FormatVersionError) as error:
        assert "\n" not in str(error) and str(directory) in str(error) and len(str(error)) < 600
        return
    said = manifest.document()
    assert json.dumps(said, sort_keys=True) == json.dumps(document, sort_keys=True), "nothing is filled in or converted"
    problems = verify(directory)
    assert all("\n" not in problem for problem in problems)
    if not problems:  # then every tensor is where it was, under its own name
        found = load_model_weights(directory)
        assert {name: found[name].flatten().tolist() for name in TENSORS} == {
            name: tensor.flatten().tolist() for name, tensor in TENSORS.items()
        }
        assert {name: entry["kinds"] for name, entry in said["tensors"].items()} == {
            name: entry["kinds"] for name, entry in original["tensors"].items()
        }


@pytest.mark.parametrize(
    "old, new",
    [
        ('"step": 8', '"step": NaN'),
        ('"step": 8', '"step": 8, "step": 9'),
        ('"step": 8', '"step": 1e999'),
        ('"step": 8', '"step": ' + "9" * 5000),
        ('"extra": {', '"extra": {"x": -Infinity, '),
        ('"extra": {', '"extra": {"x": ' + "[" * 100_000 + "]" * 100_000 + ", "),
        ('"extra": {', '"extra": {"x": ' + '{"y":' * 100_000 + "0" + "}" * 100_000 + ", "),
        ('"a": {', '"a": {"shape": [1], '),
        ('"rng_ranks": 0', f'"rng_ranks": {10**15}'),
        ('"rng_ranks": 0', f'"rng_ranks": {MAX_RANKS + 1}'),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_what_is_no_plain_json_is_refused_at_once(saved, tmp_path, old, new):
    directory = with_manifest(tmp_path / "x", saved / "3", document_of(saved / "3"))
    _, body = (directory / MANIFEST).read_bytes().split(b"\n", 1)
    assert old.encode() in body
    body = body.replace(old.encode(), new.encode(), 1)
    first = b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128_hexdigest(body).encode()
    (directory / MANIFEST).write_bytes(first + body)
    with pytest.raises(DamagedError) as caught:
        read_manifest(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def swap(document: dict[str, Any], one: str, other: str) -> None:
    turn = {one: other, other: one}
    tensors = document["tensors"]
    document["tensors"] = {turn.get(name, name): tensors[turn.get(name, name)] for name in tensors}


CONTRADICTIONS = {
    "tensors of one size in another order": lambda m: swap(m, "a", "b"),
    "a tensor of another name": lambda m: m["tensors"].update(d=m["tensors"].pop("c")),
    "one tensor fewer": lambda m: m["tensors"].pop("c"),
    "a smaller shape": lambda m: m["tensors"]["a"].update(shape=[5, 2]),
    "a kind fewer": lambda m: m["tensors"]["a"].update(kinds=["weight", "exp_avg"]),
    "another kind": lambda m: m["tensors"]["b"].update(kinds=["weight", "exp_avg", "ema"]),
    "another cut": lambda m: m["tensors"]["a"].update(parts=[[0, 0, 7], [1, 7, 8]]),
    "pieces of other ranks": lambda m: m["tensors"]["a"].update(parts=[[1, 0, 8], [0, 8, 7]]),
    "a shorter header": lambda m: m["files"][0].update(header_bytes=4088 - 1),
    "no header": lambda m: m["files"][0].update(header_bytes=0),
    "a buffer fewer": lambda m: m["buffers"].pop("mean"),
    "a buffer more": lambda m: m["buffers"].update(more=[]),
    "a buffer of another shape": lambda m: m["buffers"].update(mean=[2, 2]),
    "an averaged buffer fewer": lambda m: m["ema_buffers"].pop("mean"),
    "generator states that are not there": lambda m: m.update(rng_ranks=1),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_manifest_that_contradicts_its_files_is_found_by_verify_and_by_whoever_reads_them(
    saved, tmp_path, capsys, contradiction
):
    document = document_of(saved / "3")
    CONTRADICTIONS[contradiction](document)
    directory = with_manifest(tmp_path / "x", saved / "3", document)
    assert main(["checkpoint", "verify", str(directory)]) == 1
    out = capsys.readouterr().out
    assert "rank_0000" in out or "files[0]" in out
    with pytest.raises(DamagedError, match=r"rank_0000|files\[0\]"):
        load_model_weights(directory)
    with pytest.raises(DamagedError, match=r"rank_0000|files\[0\]"), open_stream(directory, ["weight"]):
        pass
    with pytest.raises(DamagedError, match=r"rank_0000|files\[0\]"):
        reshard(directory, tmp_path / "new", ranks=3)
    assert not (tmp_path / "new").exists()


def test_parts_that_say_what_even_says_are_the_same(saved, tmp_path):
    document = document_of(saved / "3")
    document["tensors"]["a"]["parts"] = [[0, 0, 8], [1, 8, 7]]
    assert verify(with_manifest(tmp_path / "x", saved / "3", document)) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_what_cannot_be_read_is_not_called_damaged(saved, monkeypatch, code):
    real = os.preadv

    def failing(descriptor: int, buffers: Any, at: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("rank_00001.safetensors"):
            raise OSError(code, os.strerror(code))
        return real(descriptor, buffers, at)

    monkeypatch.setattr(safetensors_file.os, "preadv", failing)
    with pytest.raises(OSError, match="rank_00001") as caught:
        load_model_weights(saved / "3")
    assert caught.value.errno == code and not isinstance(caught.value, ValueError)
    with pytest.raises(OSError, match="rank_00001"):
        reshard(saved / "3", saved / "new", ranks=3)
    problems = verify(saved / "3")
    assert problems and all("rank_00001" in problem for problem in problems)


def test_a_manifest_that_may_not_be_read_is_not_called_damaged(saved, monkeypatch):
    def denied(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    for read in (read_manifest, verify, load_model_weights):
        with pytest.raises(PermissionError, match=MANIFEST):
            read(saved / "3")


def test_what_is_read_is_typed_and_cannot_be_changed(saved):
    manifest = read_manifest(saved / "2")
    assert (manifest.world_size, manifest.zero_stage, manifest.preset) == (2, 2, "nano")
    assert manifest.identity == {"data": None, "vocab": "v"} and manifest.origin == {"ranks": 2}
    assert manifest.document()["format"] == FORMAT and manifest.tensors["a"].shape == (5, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.step = 9  # type: ignore[misc]
