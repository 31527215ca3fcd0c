"""One table of tasks: names, groups and command line agree with it, and a new task is a file, an entry and a name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import scenes_shards

from ofa_ds.cli.main import _parser
from ofa_ds.config import DataConfig, MixConfig
from ofa_ds.data.columns import SCHEMAS
from ofa_ds.data.tsv import TYPES
from ofa_ds.tasks.task import DOWNSTREAM, TABLE, asked_for, row_texts
from ofa_ds.terms import DOWNSTREAM_TASKS, FAMILIES, GROUP_OF, GROUPS, PRETRAINING_FAMILIES, PRETRAINING_TASKS, TASKS

ROOT = Path(__file__).parents[2]

TOY = '''
"""How many words a caption has."""
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import frame, question, sample_patches

PROMPT = " how many words?"

def build(row, seen, rng, ctx):
    count = " " + str(len(row["caption"].split()))
    return frame(row, ctx, PROMPT, count, image=seen.image, patches=sample_patches(rng, ctx))

def ask(ctx, picture, text):
    from ofa_ds.data.image import resize
    side = ctx.config.image_size
    return question(ctx, PROMPT + " " + text, image=resize(picture, side, side))

def texts(row):
    return [PROMPT]

def judge(ctx, asked, answers):
    expected = [example.target_text for example in asked]
    return {"right": judges.mean(judges.exact(expected, judges.texts_of(ctx, answers)))}
'''

ENTRY = '''Task(name="toy", family="vision_language", row_types=("caption",), build=toy.build, texts=toy.texts,
             ask=toy.ask, text_is="a hint", judge=toy.judge),
    )
}  # fmt: skip
"""Pretraining, in the order of'''

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, torch
import ofa_ds
assert Path(ofa_ds.__file__).is_relative_to(Path.cwd()), ofa_ds.__file__
from ofa_ds.cli import main
from ofa_ds.config import BatchConfig, DataConfig, ModelOptions, Recipe
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab
from ofa_ds.inference.evaluate import judge_tasks
from ofa_ds.inference.loaded_model import LoadedModel, generated
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.task import ask
from ofa_ds.terms import TASKS
from ofa_ds.train.loader import Loader
from ofa_ds.train.loss import task_sums, group_counts

folder = Path(sys.argv[1])
sizes = dict(image_size=64, infill_image_size=64, code_image_size=32, max_image_size=64, sample_patches=0, workers=0)
data = DataConfig(shards=str(folder / "shards"), vocab=str(folder / "vocab"), augment="none", **sizes)
settings = [f"data.{key}={value}" for key, value in sizes.items()]
assert main(["shards", "show", data.shards, *settings, "--task", "toy", "--vocab", data.vocab,
             "--recipe", "pretrain-nano", "--png", "toy.png"]) == 0
shards, vocab = Shards(data.shards), load_vocab(data.vocab)
recipe = Recipe(model=ModelOptions(preset="nano"), data=data)
model = model_config(recipe, vocab.size)
batch = next(Loader(shards=shards, vocab=vocab, config=data, batch=BatchConfig(global_rows=12, micro_rows=12),
                    model=model, seed=1).steps())[0]
torch.manual_seed(0)
loaded = LoadedModel(model=OFA(model).eval(), vocab=vocab, recipe=recipe)
values = torch.ones(len(batch.targets))
example = ask(loaded.context(shards), "toy", np.zeros((9, 9, 3), np.uint8), "hint")
print(json.dumps({
    "count": int((batch.task == TASKS.index("toy")).sum()),
    "groups": sorted(set(batch.group[batch.task == TASKS.index("toy")].tolist())),
    "targets": float(task_sums(values, values, values, batch)[TASKS.index("toy"), 3]),
    "judged": judge_tasks(loaded, shards, tasks=["toy"], rows=4),
    "asked": [example.task, example.source_text],
    "answers": len(generated(loaded, [example], max_tokens=3)),
}))
"""


def test_the_table_has_the_names_of_terms_in_their_order():
    assert tuple(TABLE) == PRETRAINING_TASKS == TASKS[:8] and tuple(GROUP_OF) == TASKS
    assert [name for name in DOWNSTREAM_TASKS if name in DOWNSTREAM] == list(DOWNSTREAM)
    assert all(name == task.name and task.group in GROUPS for name, task in TABLE.items())


def test_every_row_gives_a_task_and_every_task_has_rows():
    assert {task.family for task in TABLE.values()} == set(PRETRAINING_FAMILIES)
    assert {task.family for task in DOWNSTREAM.values()} == set(FAMILIES) - set(PRETRAINING_FAMILIES)
    assert set(SCHEMAS) == set(FAMILIES)
    types = {kind for task in TABLE.values() for kind in task.row_types}
    assert types == set(TYPES) - {""}
    assert all("type" in SCHEMAS[task.family].names for task in TABLE.values() if task.row_types)


def test_the_command_line_offers_the_tasks_of_the_table():
    for arguments in (["evaluate", "c", "--shards", "s"], ["generate", "c"], ["shards", "show", "s"]):
        for name in TABLE:
            chosen = _parser().parse_args([*arguments, "--task", name]).task
            assert chosen in (name, [name])


def test_a_mix_asks_for_the_tasks_of_the_families_that_it_draws():
    assert asked_for(DataConfig()) == PRETRAINING_TASKS
    without = asked_for(DataConfig(mix=MixConfig(image=0, text=0)))
    assert without == tuple(name for name in PRETRAINING_TASKS if name not in ("image_infilling", "text_infilling"))


def test_the_texts_of_a_row_are_those_of_its_tasks():
    assert row_texts("text", {"text": " A b "}) == [' what is the complete text of "', " a b", ' "?']


def test_a_new_task_is_a_file_an_entry_and_a_name(tmp_path):
    """Three edits to a copy of the program; then everything that deals with tasks deals with it."""
    copy = tmp_path / "program"
    shutil.copytree(ROOT / "ofa_ds", copy / "ofa_ds", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "ofa_ds/tasks/toy.py").write_text(TOY)
    edit(copy / "ofa_ds/tasks/task.py", "text_infilling, vqa\n", "text_infilling, toy, vqa\n")
    edit(copy / "ofa_ds/tasks/task.py", '    )\n}  # fmt: skip\n"""Pretraining, in the order of', f"        {ENTRY}")
    edit(
        copy / "ofa_ds/terms.py",
        '"image_infilling": "other", "text_infilling": "other",\n',
        '"image_infilling": "other", "text_infilling": "other",\n    "toy": "vision_language",\n',
    )
    edit(copy / "ofa_ds/terms.py", "PRETRAINING_TASKS = TASKS[:8]", "PRETRAINING_TASKS = TASKS[:9]")
    data = scenes_shards.build(tmp_path / "data", rows=24)
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(data)], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    *lines, found = result.stdout.splitlines()
    found = json.loads(found)
    assert "toy" in lines and (copy / "toy.png").is_file()
    assert found["count"] > 0 and found["groups"] == [0] and found["targets"] > 0
    assert found["judged"]["toy"]["examples"] == 4 and "own" in found["judged"]["toy"]["scores"]["right"]
    assert found["asked"] == ["toy", " how many words? hint"] and found["answers"] == 1


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file}: {old!r}"
    file.write_text(text.replace(old, new))
