"""ds_configs/README.md has each key of each file, with the reason, and the sizes that the 6B's buckets follow from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ofa_ds.config import load_recipe
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.model.config import preset
from ofa_ds.plan.parameters import parameters

FOLDER = Path(__file__).parents[2] / "ds_configs"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted(path.stem for path in FOLDER.glob("*.json"))
OF_6B = ("zero3_6b_a100", "zero3_6b_a100_40gb", "zero3_6b_offload")


def keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.fixture(scope="module")
def numels() -> dict[str, int]:
    return {each.name: math.prod(each.shape) for each in parameters(preset("6b"))}


def test_every_file_and_every_key_has_its_reason_and_nothing_else_has():
    rows = [line.split("|")[1:] for line in README.splitlines() if line.startswith("| `")]
    explained = {key for cell, *_ in rows for key in re.findall(r"`([\w.]+)`", cell)}
    used = {key for name in FILES for key in keys(load_deepspeed_config(name))}
    assert explained == used
    assert all(len(reason.strip()) > 20 for _, _, reason, *_ in rows)
    assert set(FILES) == set(re.findall(r"^\| (zero\w+) \|", README, flags=re.MULTILINE))


def test_the_sizes_of_the_6b_are_the_models(numels):
    def within(prefix: str) -> int:
        return sum(numel for name, numel in numels.items() if name.startswith(prefix))

    small = [numel for numel in numels.values() if numel < 250_000]
    wanted = [
        sum(numels.values()), within("encoder.layers.0."), within("decoder.layers.0."),
        numels["decoder.layers.0.fc1.weight"], within("encoder.embed_images.transformer.resblocks.0."),
        max(numels.values()), sum(small),
    ]  # fmt: skip
    section = README.partition("## The 6B's sizes")[2].partition("## What fits")[0]
    told = [int(cells[2].replace(" ", "")) for line in section.splitlines() if len(cells := line.split("|")) > 3
            and cells[2].strip()[:1].isdigit()]  # fmt: skip
    assert told == wanted
    assert f"{len(numels):,} tensors {len(small):,} are".replace(",", " ") in README


@pytest.mark.parametrize("name", OF_6B)
def test_buckets_of_the_6b_hold_what_they_are_for(numels, name):
    zero = load_deepspeed_config(name)["zero_optimization"]
    layer = sum(numel for key, numel in numels.items() if key.startswith("decoder.layers.0."))
    table = numels["decoder.token_rel_pos_table_list.1.weight"]
    prefetch = zero["stage3_prefetch_bucket_size"]
    assert layer + table <= prefetch < 1.01 * layer, "the next layer, and no more"
    assert zero["stage3_max_live_parameters"] > layer + prefetch + max(numels.values())
    assert layer < zero["stage3_max_reuse_distance"], "a layer stays from its recomputation to its backward"
    whole = zero["reduce_bucket_size"]
    assert whole >= (layer if name == "zero3_6b_a100" else 2 * numels["decoder.layers.0.fc1.weight"])
    assert zero["stage3_param_persistence_threshold"] == 0, "what stays whole is gathered by a call each"
    assert zero["leaf_module"]["classes"] == ["EncoderLayer", "DecoderLayer"]


def test_the_recipe_of_the_6b_takes_the_file_made_for_it_and_divides_over_32_to_256_ranks():
    recipe = load_recipe("pretrain-6b")
    assert recipe.deepspeed == "zero3_6b_a100" and recipe.model.activation_checkpointing
    assert [recipe.batch.accumulation_steps(ranks) for ranks in (8, 32, 64, 128, 256)] == [32, 8, 4, 2, 1]
