"""Imports point one way, only the engine touches DeepSpeed, the command line starts light. Judged by `ast` alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The floors of the house, from the ground up: a room may import its own floor's listed rooms and those below, never up.
# Unit (a package, or a module at the top of ofa_ds) -> units it may import.
ALLOWED: dict[str, set[str]] = {
    "ofa_kernels": set(),
    "terms": set(),
    "progress": set(),
    "beat": set(),
    "storage": set(),
    "config": {"terms"},
    "data": {"config", "progress", "storage", "terms"},
    "places": {"terms"},
    "batch": {"data", "places", "terms"},
    "tasks": {"config", "data", "progress", "storage", "terms"},
    "model": {"batch", "config", "ofa_kernels", "places", "terms"},
    "engine": {"config", "terms"},
    "checkpoint": {"config", "engine", "progress", "storage", "terms"},
    "inference": {
        "batch", "checkpoint", "config", "data", "model", "progress", "storage", "tasks", "terms", "vision",
    },
    "convert": {"checkpoint", "config", "data", "engine", "model", "progress", "storage", "terms"},
    "train": {
        "batch", "beat", "checkpoint", "config", "convert", "data", "engine", "inference", "model", "places", "plan",
        "progress", "storage", "tasks", "terms", "vision",
    },
    "vision": {"convert", "data", "engine", "progress", "storage", "terms"},
    "runs": {"config", "storage", "terms", "train"},
    "cluster": {"beat", "config", "engine", "model", "progress", "storage", "terms"},
    "plan": {"config", "progress", "terms"},
    "bench": {
        "batch", "checkpoint", "config", "data", "engine", "inference", "model", "plan", "progress", "storage", "tasks",
        "terms", "train", "vision",
    },
    "cli": {
        "beat", "bench", "checkpoint", "cluster", "config", "convert", "data", "engine", "inference", "model", "plan",
        "progress", "runs", "storage", "tasks", "terms", "train", "vision",
    },
    "pretrain": {"cli", "cluster"},
    "finetune": {"cli", "pretrain"},
    "predict": {"cli", "pretrain"},
}  # fmt: skip
DEEPSPEED_OWNERS = {"engine"}


def sources() -> list[Path]:
    return sorted([*(ROOT / "ofa_ds").rglob("*.py"), *(ROOT / "kernels" / "ofa_kernels").rglob("*.py")])


def module_name(file: Path) -> str:
    base = ROOT / "kernels" if "kernels" in file.relative_to(ROOT).parts else ROOT
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def unit_of(module: str) -> str:
    """`ofa_ds.data.vocab` -> `data`, `ofa_ds.batch` -> `batch`, `ofa_kernels.attention` -> `ofa_kernels`; else ''."""
    first, *rest = module.split(".")
    if first == "ofa_ds":
        return rest[0] if rest else ""
    return first if first == "ofa_kernels" else ""


def imports(tree: ast.Module, package: str, *, lazy: bool = True) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import that runs; those for type checkers alone are left out.

    package: what a leading dot means in this file. lazy: count those inside functions too.
    """
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from ofa_ds import checkpoint` imports ofa_ds.checkpoint
                yield node.lineno, f"{source}.{alias.name}" if source == "ofa_ds" else source
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))


def wrong_imports(unit: str, tree: ast.Module, package: str) -> list[str]:
    allowed = ALLOWED[unit] | {unit}
    wrong = []
    for line, module in imports(tree, package):
        target = unit_of(module)
        if target and target not in allowed:
            wrong.append(f"line {line}: {unit} may not import {module}")
        if module.split(".")[0] == "deepspeed" and unit not in DEEPSPEED_OWNERS:
            wrong.append(f"line {line}: only {', '.join(DEEPSPEED_OWNERS)} may import deepspeed")
    return wrong


@pytest.mark.parametrize("file", sources(), ids=module_name)
def test_imports_point_one_way(file: Path) -> None:
    module = module_name(file)
    unit = unit_of(module)
    if not unit:  # ofa_ds/__init__.py
        assert not list(imports(ast.parse(file.read_text()), module)), "ofa_ds/__init__.py imports nothing"
        return
    assert unit in ALLOWED, f"{module}: say in ALLOWED what {unit} may import"
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    assert wrong_imports(unit, ast.parse(file.read_text()), package) == []


def test_the_floors_have_no_circle() -> None:
    left = dict(ALLOWED)
    while ready := [unit for unit, allowed in left.items() if not allowed & left.keys()]:
        for unit in ready:
            del left[unit]
    assert not left, f"these may import one another: {sorted(left)}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    names = {module_name(file) for file in sources()}
    reaches: dict[str, set[str]] = {}
    for file in sources():
        module = module_name(file)
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(file.read_text())
        found = {each for _, each in imports(tree, package) if each in names}
        for node in ast.walk(tree):  # `from ofa_ds.data import tsv` imports ofa_ds.data.tsv
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} & names
        reaches[module] = {each for each in found if not module.startswith(f"{each}.")} - {module}
    left = dict(reaches)
    while ready := [module for module, found in left.items() if not found & left.keys()]:
        for module in ready:
            del left[module]
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    light = {"ofa_ds.cli", "ofa_ds.terms"}
    for file in (ROOT / "ofa_ds" / "cli").glob("*.py"):
        at_start = {module for _, module in imports(ast.parse(file.read_text()), "ofa_ds.cli", lazy=False)}
        heavy = {"torch", "deepspeed", "numpy", "pyarrow", "pydantic", "ofa_ds", "ofa_kernels"}
        found = {module for module in at_start if module.split(".")[0] in heavy}
        assert {module for module in found if ".".join(module.split(".")[:2]) not in light} == set(), file.name


def test_the_agent_and_the_shim_of_a_rank_start_with_the_standard_library_alone() -> None:
    pending, seen = ["ofa_ds.cluster.agent", "ofa_ds.cluster.rank"], set()
    while pending:
        module = pending.pop()
        seen.add(module)
        file = ROOT / Path(*module.split(".")).with_suffix(".py")
        tree = ast.parse(file.read_text())
        found = {each for _, each in imports(tree, module.rpartition(".")[0], lazy=False)}
        for node in ast.walk(tree):  # `from ofa_ds.cluster import processes`
            if isinstance(node, ast.ImportFrom) and node.module == "ofa_ds.cluster":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        found -= {"ofa_ds.cluster"}
        outside = {each.split(".")[0] for each in found} - {"__future__", "ofa_ds", *sys.stdlib_module_names}
        assert not outside, f"{module} imports {outside}"
        pending += [each for each in found if each.startswith("ofa_ds.") and each not in seen]
    assert seen <= {f"ofa_ds.{each}" for each in ("beat", "engine.rendezvous", "terms")} | {
        f"ofa_ds.cluster.{each}" for each in ("agent", "environment", "rank", "link", "processes")
    }
    for package in ("ofa_ds", "ofa_ds.cluster", "ofa_ds.engine"):
        assert not list(imports(ast.parse((ROOT / Path(*package.split(".")) / "__init__.py").read_text()), package))


@pytest.mark.parametrize(
    "unit, text",
    [
        ("model", "from ofa_ds.train.loss import group_sums"),
        ("model", "from ..data import shards"),
        ("data", "def f():\n    import ofa_ds.train.trainer"),
        ("checkpoint", "from ofa_ds import train"),
        ("ofa_kernels", "import ofa_ds.config"),
        ("train", "import deepspeed.comm"),
        ("data", "try:\n    from ofa_ds.model import ofa\nexcept ImportError:\n    pass"),
    ],
)
def test_a_wrong_import_is_found(unit: str, text: str) -> None:
    assert len(wrong_imports(unit, ast.parse(text), f"ofa_ds.{unit}")) == 1


def test_imports_for_type_checkers_are_free() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ofa_ds.engine.engine import Engine"
    assert wrong_imports("checkpoint", ast.parse(text), "ofa_ds.checkpoint") == []
