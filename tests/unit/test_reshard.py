"""N ranks -> M ranks -> N ranks: the same bytes, whatever the shapes, the stages and the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import COUNTERS, different, ofa_checkpoint, state_of, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ofa_ds.checkpoint.format import FORMAT, KINDS, MANIFEST, VERSION, Facts
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.loading import open_stream
from ofa_ds.checkpoint.manifest import read_manifest, write_document
from ofa_ds.checkpoint.reshard import reshard
from ofa_ds.checkpoint.runs import prune
from ofa_ds.checkpoint.state import ForeignState, Reader
from ofa_ds.checkpoint.tensor_file import write_tensors
from ofa_ds.checkpoint.verifying import describe, verify
from ofa_ds.cli import main
from ofa_ds.convert.weights import shapes_of
from ofa_ds.engine.partition import even_range, flat_parts
from ofa_ds.model.config import preset
from ofa_ds.storage.safetensors_file import DamagedError

DIMENSIONS = st.sampled_from([1, 2, 3, 5, 7, 13, 31, 64])
SHAPES = st.lists(st.lists(DIMENSIONS, max_size=3).map(tuple), min_size=1, max_size=6)
RANKS = st.one_of(st.integers(1, 9), st.sampled_from([16, 61, 128]))
STAGES = st.integers(0, 3)
SETS = st.sampled_from([KINDS[:1], KINDS[:3], KINDS, ("weight", "ema")])


def payload(path: Path) -> dict[str, bytes]:
    """Every file's bytes: headers and data."""
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


@pytest.mark.long
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=SHAPES, kinds=st.lists(SETS, min_size=6, max_size=6), n=RANKS, m=RANKS, stages=st.tuples(STAGES, STAGES))
def test_n_to_m_to_n_is_the_identity_on_every_byte(tmp_path_factory, shapes, kinds, n, m, stages):
    folder = tmp_path_factory.mktemp("reshard")
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = {f"layer.{k}": torch.randn(shape, generator=generator) for k, shape in enumerate(shapes)}
    buffers = {"seen": torch.arange(5), "mean": torch.randn(3, generator=generator)}
    state = state_of(tensors, kinds=dict(zip(tensors, kinds, strict=False)), buffers=buffers)
    write_checkpoint(folder / "n", state, ranks=n, stage=stages[0])
    reshard(folder / "n", folder / "m", ranks=m, stage=stages[1])
    reshard(folder / "m", folder / "again", ranks=n, stage=stages[0])
    assert verify(folder / "m") == []
    assert payload(folder / "again") == payload(folder / "n")
    assert different(whole(folder / "m"), whole(folder / "n")) == []
    for name, tensor in tensors.items():
        assert torch.equal(whole(folder / "m")[f"weight|{name}"], tensor)
    one, other = (read_manifest(folder / name) for name in ("n", "again"))
    assert one == dataclasses.replace(other, created=one.created)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=SHAPES, n=st.integers(1, 9), m=st.integers(1, 9), stages=st.tuples(STAGES, STAGES))
def test_few_buffers_and_descriptors_write_the_same(tmp_path_factory, monkeypatch, shapes, n, m, stages):
    folder = tmp_path_factory.mktemp("ways")
    tensors = {f"layer.{k}": torch.randn(shape) for k, shape in enumerate(shapes)}
    state = state_of(tensors, kinds=dict.fromkeys(tensors, KINDS), buffers={"seen": torch.arange(5)})
    write_checkpoint(folder / "n", state, ranks=n, stage=stages[0])
    reshard(folder / "n", folder / "m", ranks=m, stage=stages[1])
    with monkeypatch.context() as patch:
        for module in ("stream", "writing"):
            patch.setattr(f"ofa_ds.checkpoint.{module}.BUFFER_BYTES", 1)
            patch.setattr(f"ofa_ds.checkpoint.{module}.descriptor_share", lambda: 1)
        reshard(folder / "n", folder / "narrow", ranks=m, stage=stages[1])
    assert payload(folder / "m") == payload(folder / "narrow")
    one, other = (read_manifest(folder / name) for name in ("m", "narrow"))
    assert one == dataclasses.replace(other, created=one.created)


MANY = """
import resource, sys
from pathlib import Path
import ofa_ds.checkpoint.reshard as module
from ofa_ds.engine.host_memory import peak_resident_bytes
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
idle = peak_resident_bytes()
folder = Path(sys.argv[1])
module.reshard(folder / "3", folder / "1000", ranks=1000)
module.reshard(folder / "1000", folder / "back", ranks=3)
assert "torch" not in sys.modules
print((peak_resident_bytes() - idle) / 2**20)
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_a_thousand_ranks_take_few_descriptors_and_little_memory(tmp_path, stage):
    generator = torch.Generator().manual_seed(7)
    sizes = {"big": 70_001, "middle": 999, "small": 5, "none": 0}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    kinds = dict.fromkeys(tensors, KINDS) | {"small": KINDS[:1]}
    state = state_of(tensors, kinds=kinds, buffers={"seen": torch.arange(5)})
    write_checkpoint(tmp_path / "3", state, ranks=3, stage=stage)
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 256, "MiB"
    assert payload(tmp_path / "back") == payload(tmp_path / "3")
    trained = {name: tensor.numel() for name, tensor in tensors.items() if name != "small"}
    flat = flat_parts(trained, 1000) if stage == 2 else {}
    for rank in (0, 1, 499, 998, 999):  # as the rank itself would save it
        pieces = {}
        for name, tensor in tensors.items():
            start, numel = even_range(tensor.numel(), rank, 1000)
            if name in flat:
                start, numel = next((part[1:] for part in flat[name] if part[0] == rank), (0, 0))
            for offset, kind in enumerate(kinds[name] if numel else ()):
                pieces[f"{kind}|{name}"] = tensor[start : start + numel] + offset
        if rank == 0:
            pieces |= {"buffer|seen": torch.arange(5), "ema_buffer|seen": torch.arange(5) + 1}
        write_tensors(tmp_path / "alone", pieces)
        assert (tmp_path / "alone").read_bytes() == (tmp_path / "1000" / f"rank_{rank:05d}.safetensors").read_bytes()
        (tmp_path / "alone").unlink()


def test_more_ranks_than_there_can_be_are_refused_at_once(run_dir, tmp_path):
    with pytest.raises(ValueError, match="want 1 to 65536 ranks, got 1000000000"):
        reshard(run_dir, tmp_path / "new", ranks=10**9)


def test_a_flipped_bit_anywhere_stops_a_reshard_and_leaves_nothing(tmp_path):
    tensors = {"a": torch.randn(700), "b": torch.randn(3, 5)}
    buffers = {"seen": torch.arange(5)}
    write_checkpoint(
        tmp_path / "n", state_of(tensors, kinds=dict.fromkeys(tensors, KINDS), buffers=buffers), ranks=2, stage=3
    )
    for path in sorted((tmp_path / "n").iterdir()):
        whole_file = path.read_bytes()
        for at in range(3, len(whole_file), 61):
            raw = bytearray(whole_file)
            raw[at] ^= 1 << (at % 8)
            path.write_bytes(raw)
            with pytest.raises(DamagedError, match=path.name):
                reshard(tmp_path / "n", tmp_path / "m", ranks=3)
            assert [each.name for each in tmp_path.iterdir()] == ["n"]
        path.write_bytes(whole_file)
    reshard(tmp_path / "n", tmp_path / "m", ranks=3)


def test_a_stream_refuses_to_leave_elements_unchecked(tmp_path):
    tensors = {"a": torch.arange(10.0), "b": torch.arange(10.0)}
    write_checkpoint(tmp_path / "n", state_of(tensors, kinds=dict.fromkeys(tensors, KINDS[:1])), ranks=2, stage=3)
    with open_stream(tmp_path / "n", ["weight"]) as reader:
        assert torch.equal(reader.read("a", "weight", 0, 7), tensors["a"][:7])
        assert torch.equal(reader.read("a", "weight", 7, 3), tensors["a"][7:])
        reader.read("a", "weight", 0, 3)
        for name, start in (("a", 4), ("b", 3)):
            with pytest.raises(ValueError, match="from its first element to its last"):
                reader.read(name, "weight", start, 2)


def test_looking_at_checking_pruning_and_resharding_never_wait_for_torch(tmp_path):
    ofa_checkpoint(tmp_path / "run" / "step_00000002", preset("nano", vocab_size=60), ranks=2)
    run = str(tmp_path / "run")
    code = f"""
import sys
from ofa_ds.cli import main
for arguments in (["show", {run!r}], ["verify", {run!r}], ["prune", {run!r}],
                  ["reshard", {run!r}, {str(tmp_path / "new")!r}, "--ranks", "3"]):
    assert main(["checkpoint", *arguments]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert verify(tmp_path / "new") == []


@settings(max_examples=200, deadline=None)
@given(numels=st.lists(st.integers(1, 5000), min_size=1, max_size=12), ranks=RANKS)
def test_the_flat_cut_of_stages_1_and_2_covers_each_element_once(numels, ranks):
    parts = flat_parts({str(k): numel for k, numel in enumerate(numels)}, ranks)
    share = -(-sum(numels) // (2 * ranks)) * 2
    at = 0
    for numel, each in zip(numels, parts.values(), strict=True):
        assert [element for _, start, n in each for element in range(start, start + n)] == list(range(numel))
        for rank, start, n in each:
            assert rank * share <= at + start and at + start + n <= (rank + 1) * share
        at += numel


def test_generator_states_of_ranks_that_are_gone_come_back(tmp_path):
    class WithStates(ForeignState):
        def rng(self, rank: int) -> dict[str, torch.Tensor]:
            return {"torch": torch.full((16,), rank, dtype=torch.uint8)}

    plain = state_of({"a": torch.randn(9)}, kinds={"a": KINDS[:3]})
    values = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    state = WithStates(**values | {"facts": Facts(step=8, state=COUNTERS, rng_ranks=5)})
    write_checkpoint(tmp_path / "5", state, ranks=5, stage=3)
    reshard(tmp_path / "5", tmp_path / "2", ranks=2)
    reshard(tmp_path / "2", tmp_path / "7", ranks=7)
    reshard(tmp_path / "7", tmp_path / "again", ranks=5)
    assert payload(tmp_path / "again") == payload(tmp_path / "5")
    reader = Reader(tmp_path / "2", read_manifest(tmp_path / "2"))
    assert [int(reader.rng(rank)["torch"][0]) for rank in range(5)] == list(range(5)) and reader.rng(5) == {}


def test_1024_ranks_read_only_their_own_ranges(tmp_path, monkeypatch):
    tensors = {"big": torch.randn(3000), "small": torch.randn(7), "scalar": torch.randn(())}
    write_checkpoint(tmp_path / "3", state_of(tensors, kinds=dict.fromkeys(tensors, KINDS[:3])), ranks=3, stage=2)
    reshard(tmp_path / "3", tmp_path / "1024", ranks=1024, stage=3)
    reader = Reader(tmp_path / "1024", read_manifest(tmp_path / "1024"))
    for rank in (0, 1, 500, 999, 1023):  # what a rank of 1,000 asks for
        start, numel = even_range(3000, rank, 1000)
        assert torch.equal(reader.read("big", "exp_avg", start, numel), tensors["big"][start : start + numel] + 1)
    touched = {part.rank for part in reader.layout.overlaps("big", *even_range(3000, 17, 1000))}
    assert len(touched) <= 2
    reshard(tmp_path / "1024", tmp_path / "back", ranks=3, stage=2)
    assert payload(tmp_path / "back") == payload(tmp_path / "3")


def test_the_manifest_of_the_6b_at_1024_ranks_is_small_and_read_in_two_seconds(tmp_path):
    parameters, _ = shapes_of(preset("6b"))
    tensors = {
        name: {"shape": list(shape), "trainable": True, "kinds": list(KINDS[:3]), "parts": "even"}
        for name, shape in parameters.items()
    }
    listed = flat_parts({name: math.prod(shape) for name, shape in parameters.items()}, 1024)
    for stage in (2, 3):
        directory = tmp_path / str(stage)
        directory.mkdir()
        parts = listed if stage == 2 else dict.fromkeys(tensors, "even")
        held = [0] * 1024
        for name, tensor in tensors.items():
            tensor["parts"] = parts[name]
            total = math.prod(tensor["shape"])
            ranges = parts[name] if stage == 2 else [[rank, *even_range(total, rank, 1024)] for rank in range(1024)]
            for rank, _, numel in ranges:
                held[rank] += 12 * numel
        files = [
            {"name": f"rank_{rank:05d}.safetensors", "bytes": 8 + 4096 + held[rank], "header_bytes": 4096,
             "header_xxh3_128": "0" * 32} for rank in range(1024)
        ]  # fmt: skip
        for entry in files:
            with open(directory / entry["name"], "wb") as file:
                file.truncate(entry["bytes"])  # a hole: takes no room
        write_document(directory / MANIFEST, {
            "format": FORMAT, "version": VERSION, "step": 1, "world_size": 1024, "zero_stage": stage, "created": "now",
            "code": {}, "state": COUNTERS, "extra": {}, "rng_ranks": 1024, "files": files, "buffers": {},
            "ema_buffers": {}, "tensors": tensors,
        })  # fmt: skip
        assert (directory / MANIFEST).stat().st_size < 20e6
        started = time.process_time()
        manifest = read_manifest(directory)
        assert time.process_time() - started < 2, "the issue's own bound, in CPU time"
        assert len(manifest.tensors) == len(parameters) and describe(directory)["parameters"] == 6_038_669_312


@pytest.fixture
def run_dir(tmp_path):
    for step in (2, 4, 6, 8):
        state = state_of({"a": torch.randn(50)}, kinds={"a": KINDS[:3]})
        write_checkpoint(tmp_path / "run" / f"step_{step:08d}", state, ranks=2, stage=3)
    return tmp_path / "run"


def test_prune_keeps_the_newest_whole_ones_and_says_what_it_does(run_dir, capsys):
    (run_dir / "step_00000006" / MANIFEST).write_text("{")
    assert [path.name for path in prune(run_dir, 2, dry_run=True)] == ["step_00000006", "step_00000002"]
    assert main(["checkpoint", "prune", str(run_dir), "--keep", "2"]) == 0
    assert "2 checkpoints are gone" in capsys.readouterr().out
    assert sorted(path.name for path in run_dir.glob("step*")) == ["step_00000004", "step_00000008"]
    assert prune(run_dir, 2) == []
    with pytest.raises(ValueError, match="found none"):
        prune(run_dir.parent, 2)


def test_a_damaged_checkpoint_newer_than_all_whole_ones_is_not_deleted(run_dir):
    (run_dir / "step_00000008" / "rank_00001.safetensors").unlink()
    assert [path.name for path in prune(run_dir, 1)] == ["step_00000004", "step_00000002"]


def test_show_verify_and_reshard_on_the_command_line(run_dir, tmp_path, capsys):
    ofa_checkpoint(tmp_path / "ofa", preset("nano", vocab_size=60), ranks=2)
    assert main(["checkpoint", "show", str(tmp_path / "ofa"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["ranks"], facts["stage"], facts["preset"]) == (8, 2, 3, "nano")
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "ofa").glob("*.safetensors"))
    assert main(["checkpoint", "show", str(run_dir), "--tensors"]) == 0
    assert "step         8" in (shown := capsys.readouterr().out) and "weight exp_avg exp_avg_sq" in shown
    assert main(["checkpoint", "reshard", str(run_dir), str(tmp_path / "five"), "--ranks", "5", "--stage", "2"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(tmp_path / "five"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert describe(tmp_path / "five")["ranks"] == 5 and describe(tmp_path / "five")["stage"] == 2
    assert main(["checkpoint", "reshard", str(run_dir), str(tmp_path / "five"), "--ranks", "3"]) == 1
    assert "is there already" in capsys.readouterr().err


def test_nothing_is_written_into_what_is_read(run_dir, tmp_path, capsys):
    step = run_dir / "step_00000008"
    (tmp_path / "link").symlink_to(run_dir)
    (tmp_path / "step").symlink_to(step)
    before = sorted(str(path) for path in run_dir.rglob("*"))
    for source, destination in [
        (run_dir, run_dir), (run_dir, run_dir / "new"), (run_dir, tmp_path / "link" / "new"), (step, step),
        (step, step / "new"), (step, tmp_path / "step"), (step, tmp_path / "step" / "new"), (step, step / "a" / ".."),
        (tmp_path / "link", run_dir / "new"), (tmp_path / "step", step / "new"), (run_dir, step / "new"),
    ]:  # fmt: skip
        for action in (["reshard", "--ranks", "3"], ["export", "--format", "huggingface"]):
            assert main(["checkpoint", action[0], str(source), str(destination), *action[1:]]) == 1
            error = capsys.readouterr().err
            assert "which is read; give a place outside" in error and error.count("\n") == 1
    assert sorted(str(path) for path in run_dir.rglob("*")) == before
    assert main(["checkpoint", "reshard", str(step), str(run_dir / "beside"), "--ranks", "3"]) == 0


def test_verify_names_each_damaged_tensor_and_file(run_dir, capsys):
    path = run_dir / "step_00000008" / "rank_00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 128
    raw[-250] ^= 1
    path.write_bytes(raw)
    assert main(["checkpoint", "verify", str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "rank_00001.safetensors: weight|a" in lines[0] and "exp_avg_sq|a" in lines[1] and "problems: 2" in lines[2]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    from ofa_ds.storage import atomic

    class Full:
        f_bavail, f_frsize, f_files, f_favail = 10, 4096, 100, 50

    monkeypatch.setattr(atomic.os, "statvfs", lambda path: Full)
    state = state_of({"a": torch.randn(50_000)}, kinds={"a": KINDS[:3]})
    with pytest.raises(OSError, match="41.0 kB are free, [^0].* are needed"):
        write_checkpoint(tmp_path / "x", state, ranks=2, stage=3)
    Full.f_bavail = 10**9
    with pytest.raises(OSError, match="50 more files fit, 66 are needed"):
        write_checkpoint(tmp_path / "x", state, ranks=64, stage=3)
    assert list(tmp_path.iterdir()) == []
