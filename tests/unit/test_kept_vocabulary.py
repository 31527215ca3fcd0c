"""A run keeps its vocabulary: checkpoints are asked and exported from any directory, or say what is missing."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import ofa_checkpoint

from ofa_ds.checkpoint.verifying import describe
from ofa_ds.cli import main
from ofa_ds.data import kept_vocabulary
from ofa_ds.data.vocab import Vocab, load_vocab, train_vocab
from ofa_ds.data.vocab_files import KNOWN_FILES
from ofa_ds.inference.loaded_model import load_model
from ofa_ds.model.config import preset


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> tuple[Path, Vocab]:
    path = tmp_path_factory.mktemp("words") / "vocab"
    return path, train_vocab(["a cat sat on a mat"] * 3, 260, path, num_codes=16, num_bins=12)


@pytest.fixture
def run_dir(words, tmp_path) -> Path:
    """A run with one checkpoint, imported with its vocabulary, which then goes away from where it was."""
    source = tmp_path / "source"
    shutil.copytree(words[0], source)
    ofa_checkpoint(tmp_path / "bare", preset("nano", vocab_size=words[1].size))
    assert main(["checkpoint", "export", str(tmp_path / "bare"), str(tmp_path / "x.pt"), "--format", "fairseq"]) == 0
    step = tmp_path / "run" / "step_00000000"
    assert main(["checkpoint", "import", str(tmp_path / "x.pt"), str(step), "--vocab", str(source)]) == 0
    shutil.rmtree(source)
    return tmp_path / "run"


def test_a_checkpoint_is_asked_and_exported_from_another_directory(run_dir, words, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_model("../run").vocab.fingerprint == words[1].fingerprint
    assert main(["checkpoint", "export", "../run", "out", "--format", "huggingface"]) == 0
    assert load_vocab("out").fingerprint == words[1].fingerprint


def test_a_run_that_is_moved_as_a_whole_still_works(run_dir, words, tmp_path):
    run_dir.rename(tmp_path / "moved")
    assert load_model(tmp_path / "moved").vocab.fingerprint == words[1].fingerprint


def test_a_resharded_checkpoint_has_the_vocabulary_beside_it(run_dir, words, tmp_path):
    staged = tmp_path / "staged" / "step_00000000"
    assert main(["checkpoint", "reshard", str(run_dir), str(staged), "--ranks", "2"]) == 0
    assert load_model(staged).vocab.fingerprint == words[1].fingerprint


@pytest.mark.parametrize("command", ["evaluate", "generate", "huggingface", "modelscope"])
def test_without_its_vocabulary_a_checkpoint_says_so_and_nothing_half_is_left(
    run_dir, words, tmp_path, capsys, command
):
    alone = tmp_path / "alone" / "step_00000000"
    shutil.copytree(run_dir / "step_00000000", alone)
    arguments = {
        "evaluate": ["evaluate", str(alone), "--shards", str(tmp_path)],
        "generate": ["generate", str(alone), "--task", "text_infilling", "--text", "a <mask>"],
    }.get(command, ["checkpoint", "export", str(alone), str(tmp_path / "out"), "--format", command])
    if command == "evaluate":
        (tmp_path / "tsv").write_text("1\ta cat sat\n2\ton a mat\n")
        build = ["shards", "build", "--out", str(tmp_path / "shards"), "--text", str(tmp_path / "tsv")]
        assert main(build) == 0
        arguments[-1] = str(tmp_path / "shards")
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "is not beside it, and the one it was in" in error and "--vocab DIR" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if command != "evaluate":
        assert main([*arguments, "--vocab", str(words[0])]) == 0


def test_another_vocabulary_is_refused_wherever_it_comes_from(run_dir, tmp_path, words):
    other = train_vocab(["the dog ran"] * 3, 260, tmp_path / "other", num_codes=16, num_bins=12)
    with pytest.raises(ValueError, match=f"holds vocabulary {other.fingerprint}, want {words[1].fingerprint}"):
        load_model(run_dir, vocab=tmp_path / "other")
    kept = kept_vocabulary.folder(run_dir, words[1].fingerprint)
    shutil.rmtree(kept)
    (tmp_path / "other").rename(kept)
    with pytest.raises(ValueError, match=r"holds vocabulary .*--vocab DIR"):
        load_model(run_dir)
    assert load_model(run_dir, vocab=words[0]).vocab.fingerprint == words[1].fingerprint


def test_a_model_that_came_without_a_vocabulary_exports_without_one_and_says_so(tmp_path, capsys, words):
    ofa_checkpoint(tmp_path / "bare", preset("nano", vocab_size=words[1].size))
    export = ["checkpoint", "export", str(tmp_path / "bare"), str(tmp_path / "out"), "--format", "huggingface"]
    assert main(export) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="came without a vocabulary; give the model's: --vocab DIR"):
        load_model(tmp_path / "bare")
    assert load_model(tmp_path / "bare", vocab=words[0]).vocab.size == words[1].size


def test_a_vocabulary_of_another_size_is_refused(tmp_path, words):
    ofa_checkpoint(tmp_path / "bare", preset("nano", vocab_size=words[1].size + 1))
    with pytest.raises(ValueError, match=f"of {words[1].size} entries, the model of .* has {words[1].size + 1}"):
        load_model(tmp_path / "bare", vocab=words[0])


def test_many_that_keep_the_same_vocabulary_at_once_leave_one_whole_copy(words, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(kept_vocabulary.keep, tmp_path / "run", *_pair(words)) for _ in range(8)]
        found = {job.result() for job in jobs}
    assert len(found) == 1 and [path.name for path in (tmp_path / "run").iterdir()] == [found.pop().name]


def test_the_files_are_kept_as_they_were_given(words, tmp_path):
    kept = kept_vocabulary.keep(tmp_path, *_pair(words))
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        path.name: path.read_bytes() for path in words[0].iterdir() if path.name in KNOWN_FILES
    }


def _pair(words: tuple[Path, Vocab]) -> tuple[Path, str]:
    return words[0], words[1].fingerprint


def test_an_import_says_which_vocabulary_it_was_trained_with(run_dir, words):
    assert describe(run_dir)["identity"]["vocab"] == words[1].fingerprint
