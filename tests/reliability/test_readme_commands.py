"""Every command of the README and of the pages it leads to.

What takes seconds runs as pasted, in the order of the pages and in one folder. What takes minutes, a GPU or a cluster
is resolved: its options are parsed, its recipe is loaded with its overrides, its files are there.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.scenes import write_scenes
from ofa_ds.data.scenes_tasks import write_task_scenes
from ofa_ds.tasks.texts import train_from_shards

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "ofa_ds/docs").glob("*.md")),
    ROOT / "kernels/README.md",
    ROOT / "CONTRIBUTING.md",
]

TOO_LONG = {
    r"bash launchers/quickstart\.sh": "minutes; test_quickstart.py runs it, cut short, with --slow",
    r"bash launchers/pretrain\.sh": "wants hosts; tests/multihost runs it on some",
    r"(bash tests/run\.sh|(TRITON_INTERPRET=0 )?python -m pytest)": "the tests themselves",
    r"deepspeed ": "as many ranks as there are GPUs",
    r"ofa-ds plan .*--calibration": "of the command before it",
    r"(?!ofa-ds plan).*\b(pretrain-(tiny|base|6b)|scenes-long|finetune-\w+-(tiny|medium|base|large|huge))\b": "hours",
    r"ofa-ds [a-z]+ ofa-large": "released weights, which are not here",
    r"torchrun .*ofa_ds\.predict": "ranks; tests/distributed predicts on two",
    r"torchrun .*ofa_ds\.finetune ": "minutes",
    r"ofa-ds (shards build|evaluate) .*(\btsv/|\bvqa/heldout\b)": "of the commands before it",
    r"ofa-ds scenes .*--rows [0-9]{4}": "half a minute",
    r"ofa-ds scenes --out tsv/heldout": "of the command before it",
    r"python (-m ofa_ds\.bench|kernels/bench\.py)": "minutes",
    r"ofa-ds bench": "minutes, and the machine for itself",
    r"bash kernels/first_ten_minutes\.sh": "ten minutes of a GPU; test_first_ten_minutes.py runs it, cut short",
    r"torchrun .*ofa_ds/bench/": "minutes",
    r"bash launchers/setup_env\.sh": "it has made what runs this",
    r"ruff ": "not ours",
}
"""Commands that are resolved, not run (a pattern of their beginning), and why."""

ASSIGNMENT = re.compile(r"[a-z_]+(\.[a-z_]+)*=\S*")


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, in order, without comments; continued lines are one."""
    blocks = page.read_text(encoding="utf-8").split("```bash\n")[1:]
    text = "\n".join(block.partition("```")[0] for block in blocks).replace("\\\n", " ")
    lines = (shlex.join(shlex.split(line, comments=True)) for line in text.splitlines())
    return [line for line in lines if line]


def pages_with_commands() -> list[Path]:
    return [page for page in PAGES if commands(page)]


def all_commands() -> list[str]:
    return list(dict.fromkeys(command for page in pages_with_commands() for command in commands(page)))


def is_resolved(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in TOO_LONG)


TO_RUN = [command for command in all_commands() if not is_resolved(command)]
TO_RESOLVE = [command for command in all_commands() if is_resolved(command)]


# Resolved -----------------------------------------------------------------


def resolve(command: str) -> None:
    """Raises where a word of the command is unknown to who would read it."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words[1]
    if words[:2] == ["bash", "launchers/pretrain.sh"]:
        options, rest = words[2:], []
        while options and options[0].startswith("--"):
            assert options[0] != "--env" or (ROOT / options[1]).is_file(), options[1]
            options, rest = options[2:], [*rest, *options[:2]]
        check_ofa_ds(["launch", "--hostfile", options[0], *rest, "--", "pretrain", *options[1:]])
    elif words[:2] == ["bash", "launchers/quickstart.sh"]:
        check_recipe(["pretrain-nano", *[word for word in words[2:] if not word.startswith("--")]])
        check_options(words, (ROOT / words[1]).read_text())
    elif words[:2] == ["bash", "kernels/first_ten_minutes.sh"]:
        check_options(words[2:], help_of("kernels/first_ten_minutes.py"))
    elif "pytest" in words or words[1] == "tests/run.sh":
        check_tests(words)
    elif words[0] == "ofa-ds":
        check_ofa_ds(words[1:])
    elif module := next((word for word in words if word in ("ofa_ds.pretrain", "ofa_ds.finetune")), None):
        check_recipe(words[words.index(module) + 1 :])
    elif words[:3] == ["python", "-m", "ofa_ds.bench"]:
        check_options(words[3:], help_of("-m", "ofa_ds.bench", words[3]))
    elif words[:2] == ["python", "kernels/bench.py"]:
        check_options(words, help_of("kernels/bench.py"))
    elif "ofa_ds.predict" in words:
        check_ofa_ds(["predict", *words[words.index("ofa_ds.predict") + 1 :]])
    elif words[0] == "torchrun":
        assert (ROOT / words[words.index("1") + 1]).is_file()
    else:
        assert words[0] in ("ruff", "bash"), f"{command}: say how it is resolved, or let it run"


def check_recipe(arguments: list[str]) -> None:
    from ofa_ds.config import load_recipe
    from ofa_ds.model.config import model_config

    recipe = load_recipe(arguments[0], arguments[1:])
    model_config(recipe, vocab_size=1000)
    assert Path(recipe.deepspeed).is_file() or (ROOT / "ds_configs" / f"{recipe.deepspeed}.json").is_file()


def check_ofa_ds(arguments: list[str]) -> None:
    from ofa_ds.cli.main import _parser
    from ofa_ds.cli.parser import parsed

    parsed(_parser(), arguments)
    if arguments[0] == "launch":
        arguments = arguments[arguments.index("--") + 1 :]
        assert arguments[0] in ("pretrain", "finetune", "predict"), arguments
    if arguments[0] in ("pretrain", "finetune"):
        check_recipe(arguments[1:])


def check_options(words: list[str], known: str) -> None:
    for word in words:
        assert not word.startswith("--") or re.search(rf"{word}\b", known), f"{word} is no option"


def check_tests(words: list[str]) -> None:
    for word in words[words.index("pytest") + 1 if "pytest" in words else 2 :]:
        place = word.partition("::")[0]
        assert not place.startswith("tests") or (ROOT / place).exists(), place
    own = ("--all",) if words[1] == "tests/run.sh" else ()
    check_options([word for word in words if word not in ("--durations", *own)], help_of("-m", "pytest"))


@functools.cache
def help_of(*program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", TO_RESOLVE)
def test_what_takes_too_long_to_run_is_resolved(command: str) -> None:
    resolve(command)


@pytest.mark.parametrize(
    "command",
    [
        "ofa-ds evaluate runs/scenes-long --shard heldout/x --nothing",
        "torchrun --nproc-per-node 2 -m ofa_ds.pretrain scenes-long run_dri=x",
        "bash launchers/pretrain.sh --env launchers/rdma/nowhere.env hosts pretrain-6b",
        "bash launchers/pretrain.sh --retires 3 hosts pretrain-6b",
        "ofa-ds launch --hostfile hosts -- pretrain pretrain-6b run_dri=x",
        "bash launchers/quickstart.sh --frehs",
        "python -m pytest tests/nowhere",
        "python -m ofa_ds.bench nothing",
        "deepspeed --module ofa_ds.pretrain pretrain-bsae",
    ],
)
def test_a_command_that_would_fail_is_not_resolved(command: str) -> None:
    assert is_resolved(command) or command.startswith("ofa-ds")
    with pytest.raises((AssertionError, ValueError, SystemExit, subprocess.CalledProcessError)):
        resolve(command)


# Run ----------------------------------------------------------------------


def own_data(folder: Path) -> None:
    """The files that the README calls the user's own: OFA's, with pictures of the size that OFA's image rows have."""
    for name, file in [("vision_language", "vl"), ("text", "text"), ("detection", "det")]:
        shutil.copy(folder / f"data/scenes/tsv/{name}_examples.tsv", folder / f"{file}.tsv")
    shutil.copytree(folder / "data/scenes/tsv/negative_sample", folder / "negative_sample")
    codes = " ".join(str(k % 128) for k in range(256))
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)).save(png, "PNG")
    (folder / "image.tsv").write_text(f"image0\t{base64.b64encode(png.getvalue()).decode()}\t{codes}\n")
    shutil.copytree(folder / "data/scenes/vocab", folder / "OFA/utils/BPE")
    for name in ("picture", "a"):
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(folder / f"{name}.png")
    for file in ("vqa_train", "vqa_val", "vqa_test", "caption_stage2_train"):
        write_task_scenes(folder / "given", file.partition("_")[0], rows=8, seed=1).rename(folder / f"{file}.tsv")
    answers = (folder / "given/answers.txt").read_text().splitlines()
    (folder / "trainval_ans2label.pkl").write_bytes(pickle.dumps({answer: k for k, answer in enumerate(answers)}))


def as_the_quick_start_leaves_it(folder: Path) -> None:
    """data/scenes, in small; the run is copied from that of the README once it is there."""
    scenes = folder / "data/scenes"
    for split, rows in [("heldout", 24), ("train", 64)]:
        shutil.rmtree(scenes / "tsv", ignore_errors=True)
        write_scenes(scenes / "tsv", rows=rows, seed=1, split=split)
        names = ("vision_language", "text", "image", "detection")
        files = {name: [scenes / f"tsv/{name}_examples.tsv"] for name in names}
        build_shards(scenes / split, **files, negatives=scenes / "tsv/negative_sample", workers=1)
    train_from_shards(scenes / "train", size=300, out=scenes / "vocab", num_codes=128, num_bins=65)


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(the folder in which all of it ran, output of each command)."""
    folder = tmp_path_factory.mktemp("pasted")
    as_the_quick_start_leaves_it(folder)
    own_data(folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    outputs = {}
    for command in TO_RUN:
        if "runs/nano" in command and not (folder / "runs/nano").exists():
            shutil.copytree(folder / "runs/small", folder / "runs/nano", symlinks=True)
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        outputs[command] = done.stdout
    return folder, outputs


def test_every_command_that_takes_seconds_works_as_pasted(pasted: tuple[Path, dict[str, str]]) -> None:
    folder, outputs = pasted
    assert len(outputs) == len(TO_RUN) >= 22
    assert "done: 6 steps" in "".join(outputs.values())
    for made in ("runs/new/step_00000002/manifest.json", "look.png", "answer.png"):
        assert (folder / made).exists()


def test_readme_and_pages_have_commands() -> None:
    names = {page.name for page in pages_with_commands()}
    assert names >= {"README.md", "checkpoints.md", "results.md", "benchmarks.md"}
    for page in PAGES:
        for word in re.findall(r"`(ofa-ds [a-z]+(?: [a-z]+)?)", page.read_text(encoding="utf-8")):
            with pytest.raises(SystemExit) as end:
                check_ofa_ds([*word.split()[1:], "--help"])
            assert end.value.code == 0, f"{page.name}: `{word}`"


@pytest.mark.parametrize("kind", ["huggingface", "modelscope", "fairseq", "deepspeed", "universal"])
def test_what_came_in_is_what_went_out(pasted: tuple[Path, dict[str, str]], kind: str) -> None:
    from ofa_ds.checkpoint import describe, load_model_weights

    folder, _ = pasted
    ours, back = (load_model_weights(folder / "runs" / name) for name in ("small", f"from_{kind}"))
    assert ours.keys() == back.keys()
    assert all(bool((ours[name] == back[name]).all()) for name in ours)
    facts, original = describe(folder / "runs" / f"from_{kind}"), describe(folder / "runs/small")
    assert facts["preset"] == "nano" and facts["identity"]["vocab"] == original["identity"]["vocab"]
    assert facts["kinds"] == (original["kinds"] if kind in ("deepspeed", "universal") else ["weight"])
