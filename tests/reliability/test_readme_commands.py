"""The README's section on checkpoints, copied and pasted: every command runs, and what came in is what went out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scenes_shards

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[str]:
    """Lines of the bash blocks of the section, in order."""
    section = README.read_text(encoding="utf-8").partition("## Checkpoints\n")[2].partition("\n## ")[0]
    blocks = section.split("```bash\n")[1:]
    return [line for block in blocks for line in block.partition("```")[0].splitlines() if line.strip()]


@pytest.fixture(scope="module")
def pasted(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(the folder in which all of it ran, output of each command)."""
    folder = tmp_path_factory.mktemp("pasted")
    shutil.copytree(scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=64), folder / "data")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    outputs = {}
    for command in commands():
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        outputs[command] = done.stdout
    return folder, outputs


def test_every_command_of_the_section_works(pasted):
    folder, outputs = pasted
    assert len(outputs) == len(commands()) >= 17
    assert "done: 6 steps" in "".join(outputs.values())
    assert (folder / "runs/new/step_00000002/manifest.json").exists()


@pytest.mark.parametrize("kind", ["huggingface", "modelscope", "fairseq", "deepspeed", "universal"])
def test_what_came_in_is_what_went_out(pasted, kind):
    from ofa_ds.checkpoint import describe, load_model_weights

    folder, _ = pasted
    ours, back = (load_model_weights(folder / "runs" / name) for name in ("nano", f"from_{kind}"))
    assert ours.keys() == back.keys()
    assert all(bool((ours[name] == back[name]).all()) for name in ours)
    facts, original = describe(folder / "runs" / f"from_{kind}"), describe(folder / "runs/nano")
    assert facts["preset"] == "nano" and facts["identity"]["vocab"] == original["identity"]["vocab"]
    assert facts["kinds"] == (original["kinds"] if kind in ("deepspeed", "universal") else ["weight"])
