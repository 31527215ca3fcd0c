"""Predictions: what each leaderboard takes, every row once, whatever was killed, on any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import task_models

from ofa_ds.cli import main
from ofa_ds.data.shards import Shards
from ofa_ds.inference.asking import How
from ofa_ds.inference.predict import check_out, partial_directory, predict
from ofa_ds.inference.share import Share
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.terms import DOWNSTREAM_TASKS

ROWS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def shards(folder: Path) -> dict[str, Shards]:
    return task_models.build(folder, rows=ROWS)


def lines_of(out: Path, shards: Shards) -> None:
    """Every row once, in order."""
    rows = [shards.row("downstream", i) for i in range(ROWS)]
    text = out.read_text(encoding="utf-8")
    if out.suffix == ".json":
        found = json.loads(text)
        keys = {frozenset(each) for each in found}
        (kind,) = keys
        name = next(iter(kind & {"question_id", "image_id", "uniq_id"}))
        assert [str(each[name]) for each in found] == [row["image_id" if name == "image_id" else "id"] for row in rows]
        assert kind - {name} in ({"answer"}, {"caption"}, {"box"}, {"codes"})
    elif out.suffix == ".tsv":
        head, *found = text.splitlines()
        assert head == "index\tprediction" and len(found) == ROWS
        indices = [line.split("\t")[0] for line in found]
        assert indices in ([str(k) for k in range(ROWS)], [row["id"] for row in rows])
    else:
        assert text.count("\n") == ROWS


SUFFIX = {name: ".tsv" for name in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2")} | {"gigaword": ".txt"}


@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_every_row_of_every_task_is_there_once_in_the_leaderboards_form(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, task: str
) -> None:
    out = tmp_path / f"{task}{SUFFIX.get(task, '.json')}"
    model = task_models.model_of(folder, task)
    assert predict(model, shards[task], task, out, block_rows=4)
    lines_of(out, shards[task])
    assert not partial_directory(out).exists()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_processes_write_the_same_file_whoever_comes_last(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, world_size: int
) -> None:
    model = task_models.model_of(folder, "vqa")
    predict(model, shards["vqa"], "vqa", tmp_path / "alone.json", block_rows=3)

    def run(rank: int) -> bool:
        share = Share(rank=rank, world_size=world_size)
        return predict(model, shards["vqa"], "vqa", tmp_path / "together.json", block_rows=3, share=share)

    with ThreadPoolExecutor(world_size) as pool:
        complete = list(pool.map(run, range(world_size)))
    assert any(complete)
    assert (tmp_path / "together.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


@pytest.mark.parametrize("count", [2, 4])
def test_the_same_command_twice_at_once_writes_every_row_once_and_leaves_nothing(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, count: int
) -> None:
    model, out = task_models.model_of(folder, "cola"), tmp_path / "twice.tsv"
    predict(model, shards["cola"], "cola", tmp_path / "alone.tsv", block_rows=1)
    with ThreadPoolExecutor(count) as pool:
        complete = list(pool.map(lambda _: predict(model, shards["cola"], "cola", out, block_rows=1), range(count)))
    assert complete == [True] * count
    assert out.read_bytes() == (tmp_path / "alone.tsv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.tsv", "twice.tsv"]


def test_a_process_that_looks_while_another_puts_all_together_says_that_all_is_done(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ofa_ds.inference import predict as module

    model, out = task_models.model_of(folder, "cola"), tmp_path / "cola.tsv"
    real, begun = module._put_together, module._begin

    def put_together(partial: Path, *given) -> bool:
        file = module._file

        def looked_for(folder: Path, block: int) -> Path:
            monkeypatch.setattr(module, "_file", file)
            assert real(partial, *given)  # the other process, after this one began to look
            return file(folder, block)

        monkeypatch.setattr(module, "_file", looked_for)
        return real(partial, *given)

    monkeypatch.setattr(module, "_put_together", put_together)
    assert predict(model, shards["cola"], "cola", out)
    assert [path.name for path in tmp_path.iterdir()] == ["cola.tsv"]

    def begin(partial: Path, settings) -> None:
        begun(partial, settings)
        shutil.rmtree(partial)
        raise FileNotFoundError(partial)

    monkeypatch.setattr(module, "_put_together", real)
    monkeypatch.setattr(module, "_begin", begin)
    assert predict(model, shards["cola"], "cola", out)
    with pytest.raises(FileNotFoundError):
        predict(model, shards["cola"], "cola", tmp_path / "other.tsv")


def test_a_rank_that_comes_when_all_is_done_leaves_nothing_behind(
    folder: Path, shards: dict[str, Shards], tmp_path: Path
) -> None:
    model, out = task_models.model_of(folder, "cola"), tmp_path / "cola.tsv"
    assert predict(model, shards["cola"], "cola", out)
    assert predict(model, shards["cola"], "cola", out, share=Share(rank=3, world_size=4))
    assert [path.name for path in tmp_path.iterdir()] == ["cola.tsv"]


def test_what_a_killed_run_has_finished_is_not_done_again_and_other_settings_are_refused(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ofa_ds.inference import predict as module

    model, out = task_models.model_of(folder, "cola"), tmp_path / "cola.tsv"
    predict(model, shards["cola"], "cola", tmp_path / "whole.tsv", block_rows=3)
    real, asked = module.answers_to, []

    def interrupted(loaded, ctx, task, examples, how, told):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([example.row_id for example in examples])
        return real(loaded, ctx, task, examples, how, told)

    monkeypatch.setattr(module, "answers_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(model, shards["cola"], "cola", out, block_rows=3)
    assert not out.exists() and len(list(partial_directory(out).glob("block-*"))) == 2
    with pytest.raises(ValueError, match="cola.tsv.partial: was begun with another decoding; remove it"):
        predict(model, shards["cola"], "cola", out, block_rows=3, how=How(beams=9, search="beam"))
    with pytest.raises(ValueError, match="another moving average"):
        predict(model, shards["cola"], "cola", out, block_rows=3, average=True)
    with pytest.raises(ValueError, match="another data"):
        predict(model, shards["cola"], "cola", out, block_rows=3, how=How(settings=("data.task.prompt=none",)))
    done = asked[:]
    asked.clear()
    later = lambda *given: asked.append([e.row_id for e in given[3]]) or real(*given)  # noqa: E731
    monkeypatch.setattr(module, "answers_to", later)
    assert predict(model, shards["cola"], "cola", out, block_rows=3)
    assert len(done) == 2 and len(asked) == 2 and not {tuple(each) for each in done} & {tuple(each) for each in asked}
    assert out.read_bytes() == (tmp_path / "whole.tsv").read_bytes()


def test_shards_of_another_task_and_a_result_that_is_there_are_refused(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(task_models.saved(task_models.model_of(folder, "vqa"), tmp_path / "vqa"))
    arguments = ["predict", checkpoint, "--task", "vqa", "--out", str(tmp_path / "vqa.json"), "--shards"]
    assert main([*arguments, str(shards["cola"].path)]) == 1
    assert "has no row for vqa, but for cola" in capsys.readouterr().err
    (tmp_path / "vqa.json").touch()
    assert main([*arguments, str(shards["vqa"].path)]) == 1
    assert "vqa.json: exists" in capsys.readouterr().err


def test_what_has_an_option_is_no_setting_and_a_wrong_setting_leaves_nothing_behind(
    folder: Path, shards: dict[str, Shards], tmp_path: Path
) -> None:
    model, out = task_models.model_of(folder, "cola"), tmp_path / "cola.tsv"
    for key, option in (("data.task.name", "--task"), ("data.vocab", "--vocab"), ("data.shards", "--shards")):
        with pytest.raises(ValueError, match=f"{key}=x: is said with {option}"):
            predict(model, shards["cola"], "cola", out, how=How(settings=(f"{key}=x",)))
    with pytest.raises(ValueError, match="63 x 63 does not divide into patches"):
        odd = How(settings=("data.image_size=63",))
        predict(task_models.model_of(folder, "vqa"), shards["vqa"], "vqa", out, how=odd)
    assert not partial_directory(out).exists()


@pytest.mark.parametrize("name, content", [
    ("settings.json", "{"), ("settings.json", "[]"), ("block-000000.jsonl", "no JSON\n" * ROWS),
    ("block-000000.jsonl", "1\n"),
])  # fmt: skip
def test_what_is_damaged_of_a_part_is_named_and_the_result_is_not_written(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    from ofa_ds.inference import predict as module

    model, out = task_models.model_of(folder, "cola"), tmp_path / "cola.tsv"
    with monkeypatch.context() as stopped:
        stopped.setattr(module, "_put_together", lambda *_: False)
        predict(model, shards["cola"], "cola", out)
    (partial_directory(out) / name).write_text(content)
    with pytest.raises(RuntimeError, match=f"{name}: .*remove"):
        predict(model, shards["cola"], "cola", out)
    assert not out.exists()


def test_rows_that_are_cut_are_counted_aloud(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tsv").write_text(f"x\t{'word ' * 500}\t1\nx\ta sentence\t0\n")
    build_task_shards(tmp_path / "a", "cola", [tmp_path / "a.tsv"], workers=1)
    model = task_models.model_of(folder, "cola")
    predict(model, Shards(tmp_path / "a"), "cola", tmp_path / "out.tsv")
    told = f"cola: 1 of the 2 rows answered here were cut to the {model.model.config.max_positions} positions"
    assert told in capsys.readouterr().err


def predicted(folder: Path, tmp_path: Path, task: str, sources: dict[str, str], *options: str) -> list[list[str]]:
    """(index, prediction) of shards of these files."""
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    files, shards = [str(tmp_path / name) for name in sources], tmp_path / "shards"
    assert main(["shards", "build", "--task", task, "--out", str(shards), *options, *files]) == 0
    assert predict(task_models.model_of(folder, task), Shards(shards), task, tmp_path / "out.tsv", block_rows=2)
    return [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()[1:]]


def test_a_row_in_quarantine_moves_no_number_of_a_hand_in_and_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = "x\ta sentence\t1\n", "x\t\t1\n"
    files = {"a.tsv": good + bad + good * 2, "b.tsv": bad + good}
    found = predicted(folder, tmp_path, "cola", files, "--on-error", "quarantine", "--rows-per-shard", "3")
    assert [index for index, _ in found] == ["0", "2", "3", "5"]
    told = "cola: the rows to hand in are not complete: 2 bad lines were put into quarantine (1 of a.tsv, 1 of b.tsv)"
    assert told in capsys.readouterr().err


def test_ids_of_a_column_are_handed_in_as_they_are_whatever_the_task_s_own_file_has(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"a.tsv": "".join(f"{k}\ta sentence\t1\n" for k in (7, 3, 12))}
    found = predicted(folder, tmp_path, "cola", given, "--columns", "id=0,text=1,label=2")
    assert [index for index, _ in found] == ["7", "3", "12"]
    assert "quarantine" not in capsys.readouterr().err
    (tmp_path / "rte").mkdir()
    given = {"b.tsv": "premise\thypothesis\tentailment\n" * 3}
    found = predicted(folder, tmp_path / "rte", "rte", given, "--columns", "text=0,text_pair=1,label=2")
    assert [index for index, _ in found] == ["0", "1", "2"]


def test_a_link_that_leads_nowhere_is_refused_before_anything_is_answered(tmp_path: Path) -> None:
    (tmp_path / "out.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="out.json: exists"):
        check_out(tmp_path / "out.json")


def test_pretraining_shards_are_told_from_those_of_another_task(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tsv").write_text("1\ta text of pretraining\n")
    build = ["shards", "build", "--out", str(tmp_path / "a"), "--text", str(tmp_path / "a.tsv"), "--workers", "1"]
    assert main(build) == 0
    checkpoint = str(task_models.saved(task_models.model_of(folder, "cola"), tmp_path / "cola"))
    asked = [checkpoint, "--task", "cola", "--shards", str(tmp_path / "a")]
    assert main(["predict", *asked, "--out", str(tmp_path / "out")]) == 1
    assert "a: has rows of pretraining, want those of cola" in capsys.readouterr().err
    assert main(["evaluate", *asked]) == 1
    assert "a: has no row for cola" in capsys.readouterr().err


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ofa_ds.data.shards import Shards
from ofa_ds.inference.loaded_model import load_model
from ofa_ds.inference.predict import predict
print(predict(load_model(sys.argv[2], "cpu"), Shards(sys.argv[3]), "caption", Path(sys.argv[4]), block_rows=1))
"""


def test_a_run_that_is_killed_goes_on_where_it_was(folder: Path, shards: dict[str, Shards], tmp_path: Path) -> None:
    model = task_models.model_of(folder, "caption")
    checkpoint = task_models.saved(model, tmp_path / "caption")
    out, whole = tmp_path / "caption.json", tmp_path / "whole.json"
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(checkpoint), str(shards["caption"].path)]
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL)
    while not list(partial_directory(out).glob("block-*2.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists(), "killed in time"
    times = {file: file.stat().st_mtime_ns for file in partial_directory(out).glob("block-*")}
    assert 3 <= len(times) < ROWS
    assert predict(model, shards["caption"], "caption", whole, block_rows=1)
    done = subprocess.run([*command, str(out)], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert out.read_bytes() == whole.read_bytes()


def test_two_ranks_of_torchrun_write_what_the_command_writes_alone(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(task_models.saved(task_models.model_of(folder, "vqa"), tmp_path / "vqa"))
    arguments = [checkpoint, "--task", "vqa", "--shards", str(shards["vqa"].path), "--decoding", "open", "--out"]
    assert main(["predict", *arguments, str(tmp_path / "alone.json")]) == 0
    assert capsys.readouterr().out.endswith("alone.json: written\n")
    done = torchrun("--module", "ofa_ds.predict", *arguments, str(tmp_path / "two.json"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


def test_two_ranks_of_torchrun_judge_what_the_command_judges_alone(
    folder: Path, shards: dict[str, Shards], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(task_models.saved(task_models.model_of(folder, "refcoco"), tmp_path / "refcoco"))
    arguments = ["evaluate", checkpoint, "--task", "refcoco", "--shards", str(shards["refcoco"].path), "--json"]
    assert main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)["tasks"]["refcoco"]
    done = torchrun("--no-python", "ofa-ds", *arguments)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)["tasks"]["refcoco"]
    assert together["scores"] == alone["scores"] and together["examples"] == ROWS
    assert together["loss"]["own"] == pytest.approx(alone["loss"]["own"], rel=1e-4)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks on this host's CPU."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
