"""DeepSpeed's folder and its universal checkpoint, with DeepSpeed itself on the other side: not a bit changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import launch
from formats_cases import EXPORTS, JOBS, SAVED, UNIVERSAL, WORKER

from ofa_ds.checkpoint.format import Facts, TensorInfo
from ofa_ds.checkpoint.manifest import read_manifest
from ofa_ds.checkpoint.state import ForeignState, Reader
from ofa_ds.convert.deepspeed_folder import read_deepspeed, write_deepspeed
from ofa_ds.convert.universal import read_universal, write_universal

pytestmark = pytest.mark.long

NOT_TAKEN = {f"{start}{name}" for start in ("weight|", "copy of ") for name in ("frozen.weight", "frozen.bias")}
NOT_TAKEN |= {f"blocks.{block}.seen" for block in range(3)}
"""What DeepSpeed does not take from any universal checkpoint, its own included: buffers and frozen parameters."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module")
def results(folder: Path) -> Callable[[int, str], Any]:
    """results(world size, job): launched once, when first asked for; 2 ranks always before the others."""
    found: dict[int, dict[str, Any]] = {}
    tried: set[int] = set()

    def get(world_size: int, job: str) -> Any:
        for needed in dict.fromkeys((2, world_size)):
            if needed not in tried:
                tried.add(needed)
                found[needed] = launch(folder, needed, *JOBS[needed], worker=WORKER)
        return found[world_size][job]

    return get


def test_what_deepspeed_saved_loads_as_if_saved_here(results):
    norms = results(2, "saved")
    found = results(2, "imported")
    assert len(found) == len(SAVED)
    for (precision, stage), result in zip(SAVED, found, strict=True):
        assert (result["different"], result["state"]) == ([], True), result
        assert result["norm"] == norms[f"{precision}_{stage}"]  # two steps on


def test_a_checkpoint_without_zero_is_read_exactly(results):
    assert results(1, "stage0") == []


@pytest.mark.parametrize("world_size", EXPORTS)
def test_deepspeed_loads_what_was_written_for_it(results, world_size):
    norms = results(2, "saved")
    found = results(world_size, "exported")
    assert len(found) == len(EXPORTS[world_size])
    for (source, precision, stage), result in zip(EXPORTS[world_size], found, strict=True):
        assert result["path"] and result["scaler"], result
        assert (result["different"], result["state"]) == ([], True), result
        assert result["lost"] == []  # read back, and by zero_to_fp32
        if world_size == 2 and source == f"{precision}_{stage}":
            assert result["norm"] == norms[source]


@pytest.mark.parametrize("world_size", UNIVERSAL)
def test_deepspeed_loads_a_universal_checkpoint_at_any_stage(results, world_size):
    found = results(world_size, "universal")
    assert len(found) == len(UNIVERSAL[world_size])
    for result in found:
        assert result["path"] and result["state"] and not result["lost"], result
        assert set(result["different"]) <= NOT_TAKEN, result
        assert 0 < result["norm"] < 100


def test_what_deepspeeds_converter_made_is_read_exactly(results):
    found = results(2, "converted")
    assert len(found) == len(SAVED)
    for result in found:
        assert (result["different"], result["state"]) == ([], True), result


@pytest.fixture
def deepspeed_folder(results, folder, tmp_path) -> Path:
    """A copy of one at stage 3, to be harmed."""
    results(2, "saved")
    return Path(shutil.copytree(folder / "deepspeed_fp32_3", tmp_path / "copy"))


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt",
                                  "zero_pp_rank_0_mp_rank_00_model_states.pt",
                                  "zero_pp_rank_1_mp_rank_00_model_states.pt"])  # fmt: skip
def test_a_missing_file_is_named(deepspeed_folder, name):
    (deepspeed_folder / "global_step4" / name).unlink()
    assert name in one_line(lambda: read_deepspeed(deepspeed_folder))


def test_the_last_rank_is_missed_too(deepspeed_folder):
    (deepspeed_folder / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "of 2 ranks, among 1 files" in one_line(lambda: read_deepspeed(deepspeed_folder))


def test_mixed_world_sizes_are_refused(deepspeed_folder):
    path = deepspeed_folder / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(path, path.with_name("zero_pp_rank_2_mp_rank_00_optim_states.pt"))
    assert "want one world size" in one_line(lambda: read_deepspeed(deepspeed_folder))


def test_a_cut_file_is_refused(deepspeed_folder):
    path = deepspeed_folder / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(path, path.stat().st_size // 2)
    assert path.name in one_line(lambda: read_deepspeed(deepspeed_folder))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/nowhere/hostile",)


@pytest.mark.parametrize("name", ["zero_pp_rank_1_mp_rank_00_optim_states.pt",
                                  "zero_pp_rank_1_mp_rank_00_model_states.pt"])  # fmt: skip
def test_foreign_code_is_not_run(deepspeed_folder, name):
    path = deepspeed_folder / "global_step4" / name
    torch.save({"optimizer_state_dict": Hostile(), "frozen_param_fragments": {}}, path)
    text = one_line(lambda: read_deepspeed(deepspeed_folder))
    assert name in text and "posix.mkdir" in text


def test_a_pointer_leads_nowhere_else(deepspeed_folder):
    (deepspeed_folder / "latest").write_text("../elsewhere")
    assert "want a directory beside it" in one_line(lambda: read_deepspeed(deepspeed_folder))


@pytest.mark.parametrize("change", [{"param_shapes": None}, {"param_shapes": [{"a": [-1]}]}, {"module": []},
                                    {"param_shapes": [{"a": [10**9]}]}, {"buffer_names": ["x"]},
                                    {"dp_world_size": None}, {"global_steps": "x"}, {"ofa_ds_extra": 3},
                                    {"frozen_param_shapes": {"frozen.weight": [9], "frozen.bias": [9]}},
                                    {"frozen_param_fragments": {}}])  # fmt: skip
def test_other_content_is_refused(deepspeed_folder, change):
    path = deepspeed_folder / "global_step4" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    assert "copy" in one_line(lambda: read_deepspeed(deepspeed_folder))


def test_a_universal_checkpoint_without_a_tensor_is_refused(results, folder, tmp_path):
    results(2, "universal")
    copy = Path(shutil.copytree(folder / "universal_fp32_3_as_fp32_1_2", tmp_path / "copy"))
    (copy / "global_step4_universal" / "zero" / "final.bias" / "exp_avg.pt").unlink()
    assert "final.bias/exp_avg.pt: missing" in one_line(lambda: read_universal(copy))


def test_no_name_leads_out_of_a_universal_checkpoint(results, folder, tmp_path):
    results(2, "universal")
    copy = Path(shutil.copytree(folder / "universal_fp32_3_as_fp32_1_2", tmp_path / "copy"))
    path = copy / "global_step4_universal" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=True) | {"param_shapes": [{"../../../x": [1]}]}, path)
    assert "'../../../x': not the name of a parameter" in one_line(lambda: read_universal(copy))


def weights_alone(**facts: Any) -> ForeignState:
    return ForeignState(
        tensors={"a": TensorInfo(shape=(3,))}, buffers={}, facts=Facts(**facts),
        read=lambda name, kind, start, numel: torch.ones(numel), buffer=lambda name: torch.ones(0),
    )  # fmt: skip


def test_weights_alone_are_no_universal_checkpoint(tmp_path):
    assert "no optimizer moments" in one_line(lambda: write_universal(weights_alone(), tmp_path / "new"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("facts", [{}, {"state": {"adam_step": 5}, "extra": {"recipe": {"optim": {}}}}])
def test_an_optimizer_is_not_made_up(tmp_path, facts):
    state, new = weights_alone(**facts), tmp_path / "new"
    text = one_line(lambda: write_deepspeed(state, new, ranks=2, stage=3, dtype=torch.float32))
    assert ("moments of 1 tensors" if facts else "lr, betas, eps, weight_decay") in text
    assert "--format huggingface" in text and not any(tmp_path.iterdir())


def test_fp16_needs_a_loss_scale(results, folder, tmp_path):
    results(2, "saved")
    original = folder / "ours_fp32_3" / "step_00000004"
    state = Reader(original, read_manifest(original))
    new = tmp_path / "new"
    assert "loss scale" in one_line(lambda: write_deepspeed(state, new, ranks=1, stage=3, dtype=torch.float16))


def test_an_export_names_no_class_of_this_project(results, folder):
    results(2, "exported")
    named = {
        name for path in (folder / "deepspeed_fp16_3_as_fp16_3_2").rglob("*.pt")
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
    }  # fmt: skip
    assert named == {"deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"}
