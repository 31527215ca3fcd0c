"""The table of DeepSpeed's keys is DeepSpeed's; what is not in it, or of a wrong type, is one line before torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from typing_extensions import is_typeddict

from ofa_ds.engine import deepspeed_keys as keys
from ofa_ds.engine.config import _OWNED_BY_RECIPE, load_deepspeed_config

SECTIONS = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", keys.ZeroOptimization),
    "offload_param": ("deepspeed.runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig", keys.OffloadParam),
    "offload_optimizer": (
        "deepspeed.runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig", keys.OffloadOptimizer,
    ),
    "leaf_module": ("deepspeed.runtime.zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig", keys.LeafModule),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config", keys.Bf16),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config", keys.Fp16),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig", keys.CommsLogger),
    "flops_profiler": ("deepspeed.profiling.config", None, keys.FlopsProfiler),
    "activation_checkpointing": ("deepspeed.runtime.activation_checkpointing.config", "ACT_CHKPT_DEFAULT",
                                 keys.ActivationCheckpointing),
    "aio": ("deepspeed.runtime.swap_tensor.aio_config", "AIO_DEFAULT_DICT", keys.Aio),
}  # fmt: skip


@pytest.fixture(scope="module")
def deepspeed():
    return pytest.importorskip("deepspeed")


class Asked(dict):
    """A configuration that notes which keys it is asked for."""

    seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Asked:
        return self

    def __copy__(self) -> Asked:
        return Asked(self)


OLD_OR_NOT_OURS = {"bfloat16", "managed_gradient_accumulation"}
NOT_ASKED_AT_START = {"zero_force_ds_cpu_optimizer"}


def test_the_keys_at_the_top_are_those_that_deepspeed_asks_for(deepspeed):
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = Asked(train_micro_batch_size_per_gpu=1)
    DeepSpeedConfig(asked)
    table = set(get_type_hints(keys.Top))
    assert not table & set(_OWNED_BY_RECIPE)
    assert asked.seen - set(_OWNED_BY_RECIPE) - OLD_OR_NOT_OURS == table - (NOT_ASKED_AT_START - asked.seen)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_keys_and_ranges_of_a_section_are_deepspeeds(deepspeed, name):
    import importlib

    module, attribute, ours = SECTIONS[name]
    if attribute is None:
        attribute = next(each for each in vars(importlib.import_module(module)) if each.endswith("ConfigBase")
                         or each == "DeepSpeedFlopsProfilerConfig")  # fmt: skip
    theirs = getattr(importlib.import_module(module), attribute)
    if isinstance(theirs, dict):
        assert set(get_type_hints(ours)) == set(theirs)
        return
    if not hasattr(theirs, "model_fields"):
        made = theirs({})
        assert set(get_type_hints(ours)) == set(vars(made)) - {"proton_profile", "flops_profiler"}
        return
    wanted = {}
    for field, info in theirs.model_fields.items():
        if not (info.json_schema_extra or {}).get("deprecated"):
            wanted[info.alias or field] = info
    assert set(get_type_hints(ours)) == set(wanted)
    schema = TypeAdapter(ours).json_schema()["properties"]
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}
    for key, info in wanted.items():
        for limit in info.metadata:
            for name, word in names.items():
                if hasattr(limit, name):
                    assert schema[key].get(word) == getattr(limit, name), f"{key}: {word}"


def sections(kind: type = keys.Top, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The place of every checked key."""
    found = []
    for key, each in get_type_hints(kind, include_extras=True).items():
        found += sections(each, (*prefix, key)) if is_typeddict(each) else [(*prefix, key)]
    return [place for place in found if place[0] not in keys.UNCHECKED]


PLACES = sections()


def nested(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(place):
        value = {name: value}
    return value


def problem(tmp_path: Path, config: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError) as caught:
        load_deepspeed_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_misspelt_key_is_refused_with_the_nearest_wherever_it_stands(tmp_path, place):
    for wrong in (place[-1][:-1] + "zz", place[-1] + "s"):
        message = problem(tmp_path, nested((*place[:-1], wrong), 1))
        assert f"unknown key {'.'.join((*place[:-1], wrong))}; did you mean " in message


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_value_of_a_wrong_type_is_refused_with_its_key(tmp_path, place):
    wrong = [] if place[-1] in ("gradient_allreduce_op", "log_level") else [{"a": 1}, "wrong"]
    wrong = [each for each in wrong if not (each == "wrong" and place[-1] in ("nvme_path", "output_file"))]
    for value in (*wrong, [[1]]):
        if value == {"a": 1} and place[-1] == "zenflow":
            continue
        assert ".".join(place) in problem(tmp_path, nested(place, value))


@pytest.mark.parametrize("place", sorted({place[:n] for place in PLACES for n in range(1, len(place))}), ids=".".join)
def test_a_value_in_the_place_of_a_section_is_refused(tmp_path, place):
    for value in (True, "cpu", [], 3):
        assert f"{'.'.join(place)}: want a JSON object, got " in problem(tmp_path, nested(place, value))


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(sorted({name for place in PLACES for name in place})) | st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_json_loads_or_is_refused_in_one_line(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(config))
    try:
        assert isinstance(load_deepspeed_config(path), dict)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"bf16": {}, "bf16": {}}', "the key 'bf16' is there twice"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow: Input should be True"),
        ({"zero_optimization": {"stage": True}}, "want a number, got true"),
    ],
)
def test_what_contradicts_itself_or_would_hide_steps_that_are_not_finite_is_refused(tmp_path, config, message):
    assert message in problem(tmp_path, config)


def test_the_table_needs_no_torch():
    code = "import sys, ofa_ds.engine.config as c; c.load_deepspeed_config('zero3'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
