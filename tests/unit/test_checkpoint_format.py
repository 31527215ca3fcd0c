"""The files of a checkpoint: every flipped bit is found, no manifest can lead elsewhere, ranges are exact."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from ofa_ds.checkpoint import describe, latest, load_model_weights, verify
from ofa_ds.checkpoint.format import FORMAT, KINDS, MANIFEST, NO_STEPS, VERSION, Part, TensorInfo
from ofa_ds.checkpoint.layout import Layout
from ofa_ds.checkpoint.manifest import FormatVersionError, read_manifest, write_document
from ofa_ds.checkpoint.tensor_file import TensorFile, write_tensors
from ofa_ds.engine.partition import even_range
from ofa_ds.storage.safetensors_file import DamagedError


def write_checkpoint(directory, *, world_size=2, step=3, shapes=None):
    """A checkpoint of random tensors cut evenly; returns the weights."""
    directory.mkdir(parents=True)
    shapes = shapes or {"a": (5, 3), "b": (1,), "scalar": (), "c.d": (7,)}
    generator = torch.Generator().manual_seed(step)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    files = []
    for rank in range(world_size):
        tensors = {}
        for name, tensor in whole.items():
            start, numel = even_range(tensor.numel(), rank, world_size)
            if numel:
                for kind in KINDS[:3]:
                    tensors[f"{kind}|{name}"] = tensor.reshape(-1)[start : start + numel]
        tensors["rng|torch"] = torch.arange(16, dtype=torch.uint8)
        if rank == 0:
            tensors["buffer|count"] = torch.tensor(9)
        files.append(dataclasses.asdict(write_tensors(directory / f"rank_{rank:05d}.safetensors", tensors)))
    manifest = {
        "format": FORMAT, "version": VERSION, "step": step, "world_size": world_size, "zero_stage": 3, "created": "now",
        "code": {}, "state": NO_STEPS, "extra": {}, "rng_ranks": world_size, "files": files, "buffers": {"count": []},
        "ema_buffers": {},
        "tensors": {
            name: {"shape": list(t.shape), "trainable": True, "kinds": list(KINDS[:3]), "parts": "even"}
            for name, t in whole.items()
        },
    }  # fmt: skip
    write_document(directory / MANIFEST, manifest)
    return whole | {"count": torch.tensor(9)}


@pytest.fixture
def saved(tmp_path):
    weights = write_checkpoint(tmp_path / "run" / "step_00000003")
    return tmp_path / "run" / "step_00000003", weights


def rewrite(directory, change):
    """Change the manifest and give it a right checksum, as an attacker would."""
    path = directory / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["xxh3_128"]
    change(manifest)
    path.unlink()
    write_document(path, manifest)


def test_weights_come_back_whole(saved):
    directory, weights = saved
    found = load_model_weights(directory)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor) and found[name].shape == tensor.shape
    assert load_model_weights(directory.parent).keys() == found.keys()
    assert describe(directory.parent)["parameters"] == 15 + 1 + 1 + 7


def test_files_are_ordinary_safetensors(tmp_path):
    tensors = {"x": torch.randn(3, 2), "y": torch.arange(4, dtype=torch.int64), "z": torch.randn(2).bfloat16(),
               "empty": torch.zeros(0), "flag": torch.tensor([True, False])}  # fmt: skip
    entry = write_tensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    ours = TensorFile(tmp_path / "a.safetensors", num_bytes=entry.bytes)
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(ours.read("y", 1, 2), torch.tensor([1, 2]))


@pytest.mark.parametrize("name", [MANIFEST, "rank_00000.safetensors", "rank_00001.safetensors"])
def test_every_flipped_bit_is_found(saved, name):
    directory, _ = saved
    path = directory / name
    original = path.read_bytes()
    rng = random.Random(name)
    for _ in range(150):
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        problems = verify(directory)
        assert problems and str(directory) in problems[0]
    path.write_bytes(original)
    assert verify(directory) == []


def test_a_damaged_tensor_is_named_and_not_loaded(saved):
    directory, _ = saved
    path = directory / "rank_00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 4  # in the data of the last tensors
    path.write_bytes(raw)
    (problem,) = verify(directory)
    assert "rank_00001" in problem and "|" in problem
    weight = raw.index(b"}}") and TensorFile(path, num_bytes=len(raw)).names()[0]
    assert weight == "weight|a"


def test_a_damaged_weight_is_refused_by_load(saved):
    directory, _ = saved
    path = directory / "rank_00000.safetensors"
    raw = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin + 2] ^= 1  # first element of weight|a
    path.write_bytes(raw)
    with pytest.raises(DamagedError, match=r"weight\|a has checksum"):
        load_model_weights(directory)


@pytest.mark.parametrize("name", [MANIFEST, "rank_00001.safetensors"])
@pytest.mark.parametrize("harm", ["truncate", "grow", "remove", "link"])
def test_latest_skips_what_is_not_whole(tmp_path, capsys, name, harm):
    write_checkpoint(tmp_path / "step_00000003")
    write_checkpoint(tmp_path / "step_00000012", step=12)
    (tmp_path / ".partial_step_00000013").mkdir()
    path = tmp_path / "step_00000012" / name
    raw = path.read_bytes()
    path.unlink()
    if harm == "truncate":
        path.write_bytes(raw[:-1])
    elif harm == "grow":
        path.write_bytes(raw + b"x")
    elif harm == "link":
        (tmp_path / "elsewhere").write_bytes(raw)
        path.symlink_to(tmp_path / "elsewhere")
    assert latest(tmp_path) == tmp_path / "step_00000003"
    report = capsys.readouterr().err
    assert "step_00000012" in report and "skipped" in report and report.count("\n") == 1


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no such directory"):
        load_model_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_model_weights(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"][0].update(name="../../etc/passwd"),
        lambda m: m["files"][0].update(name="/etc/passwd"),
        lambda m: m["files"][1].update(bytes=-1),
        lambda m: m["files"][1].update(bytes=10**18),
        lambda m: m["files"].pop(),
        lambda m: m.update(world_size=3),
        lambda m: m.update(world_size="2"),
        lambda m: m.update(step=True),
        lambda m: m["tensors"]["a"].update(shape=[-5, 3]),
        lambda m: m["tensors"]["a"].update(shape=[2**40, 2**40]),
        lambda m: m["tensors"]["a"].update(shape=[5.0, 3]),
        lambda m: m["tensors"]["a"].update(parts=[[0, 0, 8], [1, 7, 8]]),
        lambda m: m["tensors"]["a"].update(parts=[[0, 0, 8], [1, 9, 6]]),
        lambda m: m["tensors"]["a"].update(parts=[[0, 0, 8], [2, 8, 7]]),
        lambda m: m["tensors"]["a"].update(parts=[[0, 0, 15], [1, 15, 1]]),
        lambda m: m["tensors"]["a"].update(parts="odd"),
        lambda m: m["tensors"]["a"].pop("shape"),
        lambda m: m.pop("tensors"),
        lambda m: m.update(format="something"),
        lambda m: m["files"][0].update(header_bytes=10**9),
        lambda m: m["files"][0].update(header_bytes=-8),
        lambda m: m["tensors"]["a"].update(parts=[[0, 0, 8], [0, 8, 7]]),
        lambda m: m["tensors"]["a"].update(kinds=["exp_avg"]),
        lambda m: m["tensors"]["a"].update(kinds=["weight", "exp_avg_sq", "exp_avg"]),
        lambda m: m["tensors"]["a"].update(kinds=["weight", "secret"]),
        lambda m: m["tensors"].update({f"a{k}": {**m["tensors"]["a"], "shape": [2**47]} for k in range(1000)}),
        lambda m: m["buffers"].update(count=[2**60]),
        lambda m: m.update(world_size=0, files=[]),
    ],
)
def test_a_hostile_manifest_is_refused_in_one_line(saved, change):
    directory, _ = saved
    rewrite(directory, change)
    with pytest.raises(DamagedError) as caught:
        read_manifest(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize(
    "version, words", [(3, "a newer ofa-ds: format version 3, this one reads 2; upgrade"), (1, "an older")]
)
@pytest.mark.parametrize("has_our_checksum", [True, False])
def test_a_checkpoint_of_another_version_is_not_damaged(saved, capsys, version, words, has_our_checksum):
    directory, _ = saved
    rewrite(directory, lambda m: m.update(version=version, tensors="of a form that is not known here"))
    if not has_our_checksum:
        path = directory / MANIFEST
        path.write_text(json.dumps({"xxh3_256": "?", **json.loads(path.read_text())}))
    for read in (read_manifest, verify, describe, load_model_weights, lambda each: latest(each.parent)):
        with pytest.raises(FormatVersionError, match=words) as caught:
            read(directory)
        assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
        assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"x": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4]}},
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        [],
    ],
)
def test_a_hostile_header_is_refused(tmp_path, header):
    text = json.dumps({"__metadata__": {}, **header} if isinstance(header, dict) else header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(DamagedError, match="x.safetensors"):
        TensorFile(path, num_bytes=path.stat().st_size)
    path.write_bytes((2**60).to_bytes(8, "little") + bytes(16))
    with pytest.raises(DamagedError, match="header of"):
        TensorFile(path, num_bytes=24)


def test_a_file_of_others_is_read_but_has_no_checksums(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert torch.equal(file.read("x"), torch.ones(3))
    assert "was written with None" in file.check(["x"])[0]


def test_a_file_put_in_the_place_of_another_is_found_by_its_header(saved):
    directory, _ = saved
    entry, *_ = read_manifest(directory).files
    raw = (directory / entry.name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert entry.bytes == len(raw) and entry.header_bytes == length
    assert entry.header_xxh3_128 == xxhash.xxh3_128_hexdigest(raw[8 : 8 + length])
    tensors = {
        name: TensorFile(directory / entry.name).read(name) + 0
        for name in json.loads(raw[8 : 8 + length])
        if name != "__metadata__"
    }
    tensors["weight|a"] += 1
    (directory / entry.name).unlink()
    write_tensors(directory / entry.name, tensors)  # whole in itself, of the same size
    (problem,) = verify(directory)
    assert "rank_00000" in problem and "header" in problem


def test_even_ranges_cover_each_element_once_at_any_world_size():
    rng = random.Random(5)
    for _ in range(300):
        world_size = rng.choice([1, 2, 3, 7, 8, 64, 1024])
        total = rng.choice([0, 1, 2, 5, 97, 1023, 1024, 1025, 4099])
        ranges = [even_range(total, rank, world_size) for rank in range(world_size)]
        assert [start + k for start, numel in ranges for k in range(numel)] == list(range(total))


def test_overlaps_are_the_parts_that_hold_the_range():
    rng = random.Random(6)
    for _ in range(400):
        world_size = rng.randint(1, 9)
        total = rng.randint(0, 40)
        even = [(rank, *even_range(total, rank, world_size)) for rank in range(world_size)]
        cuts = sorted(rng.randint(0, total) for _ in range(world_size - 1))
        uneven = [Part(r, a, b - a) for r, (a, b) in enumerate(zip([0, *cuts], [*cuts, total], strict=True)) if b > a]
        start = rng.randint(0, total)
        numel = rng.randint(0, total - start)
        wanted = set(range(start, start + numel))
        for parts, held in (("even", even), (uneven, uneven)):
            layout = Layout({"x": TensorInfo(shape=(total,))}, {"x": parts}, world_size)
            assert layout.sizes() == [4 * sum(n for rank, _, n in held if rank == each) for each in range(world_size)]
            found = [(part.rank, part.start, part.numel) for part in layout.overlaps("x", start, numel)]
            assert all(part in {tuple(item) for item in held} for part in found)
            covered = {element for _, at, size in found for element in range(at, at + size)}
            assert wanted <= covered
            assert all(set(range(at, at + size)) & wanted for _, at, size in found)
