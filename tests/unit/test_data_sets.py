"""data.sets and data.mix_changes: what a recipe may say of them, and several directories of shards that act as one."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
from recipes import problem
from tiny_sources import write_sources

from ofa_ds.config import DataConfig, DataSet, load_recipe, recipe_to_toml
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.sets import DataSets, mixture_of, open_data, sets_of
from ofa_ds.data.shards import Shards
from ofa_ds.train.epochs import Epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of all families, `all`, and of texts alone, `texts`."""
    folder = tmp_path_factory.mktemp("sets")
    build_shards(folder / "all", **write_sources(folder), workers=1)
    (folder / "more.tsv").write_text("".join(f"m{i}\tanother text of number {i}\n" for i in range(11)))
    build_shards(folder / "texts", text=[folder / "more.tsv"], workers=1)
    return folder


def config(folder: Path, **weights: int) -> DataConfig:
    return DataConfig(
        sets={name: DataSet(shards=str(folder / name), weight=weight) for name, weight in weights.items()}
    )


def test_recipes_say_sets_and_changes_in_files_and_on_the_command_line(tmp_path):
    words = ["data.shards=", "data.sets.a.shards=x/a", "data.sets.b.shards=x/b", "data.sets.b.weight=3"]
    words += ["data.mix_changes=[{step = 5, text = 4}, {step = 9, image = 0, detection = 2}]"]
    recipe = load_recipe("pretrain-nano", words)
    assert recipe.data.sets == {"a": DataSet(shards="x/a"), "b": DataSet(shards="x/b", weight=3)}
    assert [each.shards for each in recipe.data.sets.values()] == ["x/a", "x/b"]
    first = recipe.data.weights()
    assert recipe.data.changes(24) == [
        (4 * 24, {**first, "text": 4}), (8 * 24, {**first, "text": 4, "image": 0, "detection": 2}),
    ]  # fmt: skip
    (tmp_path / "r.toml").write_text(recipe_to_toml(recipe))
    again = load_recipe(tmp_path / "r.toml")
    assert again == recipe and again.data.sets["a"].shards == "x/a"


@pytest.mark.parametrize("override, message", [
    ("data.sets.a.shards=x", 'data.sets: data.shards names one too; put it among them, and set data.shards=""'),
    ("data.sets.a.weight=1", "data.sets.a.shards: is missing"),
    ("data.sets.a.path=x", "unknown key data.sets.a.path"),
    ("data.sets.a=x", "data.sets.a is a section"),
    ("data.mix_changes=[{step = 1}]", "data.mix_changes.0.step: "),
    ("data.mix_changes=[{text = 4}]", "data.mix_changes.0.step: is missing"),
    ("data.mix_changes=[{step = 4, tex = 4}]", "data.mix_changes.0.tex: "),
    ("data.mix_changes=[{step = 4}, {step = 4, text = 4}]", "want their steps in order, each once, got [4, 4]"),
    ("data.mix_changes=[{step = 4, vision_language = 0, text = 0, image = 0, detection = 0}]", "all weights are zero"),
])  # fmt: skip
def test_what_cannot_be_is_one_line_with_the_key(override, message):
    assert message in problem("data.shards=d", override)


def test_sets_are_one_after_the_other_in_each_family_and_any_row_is_read_from_its_own(folder):
    data = open_data(config(folder, all=1, texts=3))
    one, other = Shards(folder / "all"), Shards(folder / "texts")
    assert data.families == {**one.families, "text": one.families["text"] + 11} and data.types == one.types
    assert data.row("text", 6)["id"] == one.row("text", 6)["id"] and data.row("text", 7)["id"] == "m0"
    assert data.fields("text", 17, ["id"]) == other.fields("text", 10, ["id"])
    assert data.where("text", 8) == "texts: text-00000.arrow row 1"
    assert f"set texts: {folder / 'texts'}: text row 1 (text-00000.arrow row 1)" in data.named("text", 8)
    with pytest.raises(IndexError, match="text row 18 is outside"):
        data.row("text", 18)
    assert list(data.rows_of_types("text", [], start=3, max_rows=9)) == list(range(3, 12))
    assert list(data.rows_of_types("vision_language", ["qa"])) == list(one.rows_of_types("vision_language", ["qa"]))
    assert list(data.negatives.captions) == list(one.negatives.captions)
    again = pickle.loads(pickle.dumps(data))
    assert again.fingerprint == data.fingerprint and again.row("text", 9) == data.row("text", 9)


def test_rows_that_will_be_read_soon_are_asked_for_in_their_own_sets(folder, monkeypatch):
    shards, asked = open_data(config(folder, all=1, texts=1)), []
    monkeypatch.setattr(Shards, "announce", lambda own, rows: asked.append((own.path.name, rows)))
    shards.announce([("text", 0), ("text", 17), ("detection", 2), ("text", 6)])
    assert asked == [("all", [("text", 0), ("detection", 2), ("text", 6)]), ("texts", [("text", 10)])]


def test_the_fingerprint_is_of_the_sets_in_their_order_and_of_one_set_its_own(folder):
    prints = [open_data(config(folder, **{name: 1 for name in names})).fingerprint
              for names in (["all"], ["texts"], ["all", "texts"], ["texts", "all"])]  # fmt: skip
    assert len(set(prints)) == 4 and prints[0] == Shards(folder / "all").fingerprint
    assert list(sets_of(Shards(folder / "all"))) == [""]


def test_a_set_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match="^data.sets.gone: .*no shards there"):
        open_data(config(folder, all=1, gone=1))


def test_lists_of_answers_that_differ_are_refused(folder, tmp_path):
    (tmp_path / "rows.tsv").write_text("1\ta\n2\tb\n")
    sets = {}
    for name, answers in (("a", ["a", "b"]), ("b", ["a", "b", "c"])):
        sets[name] = answered(answers)
    with pytest.raises(ValueError, match="lists of answers of a and b are not the same"):
        DataSets(sets)


def answered(answers: list[str]) -> Shards:
    """What is asked of shards before a row is read."""
    shards = object.__new__(Shards)
    shards.__dict__.update(answers=tuple(answers), families={}, types={}, fingerprint="f")
    return shards


def test_each_family_keeps_its_share_whatever_sets_it_comes_from(folder):
    data, recipe = open_data(config(folder, all=1, texts=3)), config(folder, all=1, texts=3)
    rows = mixture_of(data, recipe, global_rows=24, seed=5).rows(0, 12 * 40)
    plain = mixture_of(Shards(folder / "all"), DataConfig(shards="x"), global_rows=24, seed=5).rows(0, 12 * 40)
    assert [family for family, _, _ in rows] == [family for family, _, _ in plain]
    assert [row for row in rows if row[0] != "text"] == [row for row in plain if row[0] != "text"]
    texts = [row >= 7 for family, _, row in rows if family == "text"]
    assert all(abs(sum(texts[: n + 1]) - 0.75 * (n + 1)) <= 1 for n in range(len(texts)))


def test_epochs_of_small_sets_are_counted_and_told_at_powers_of_two(folder):
    recipe = config(folder, all=1, texts=3)
    mixture = mixture_of(open_data(recipe), recipe, global_rows=24, seed=5)
    epochs = Epochs(mixture, ["all", "texts"], 24)
    assert epochs.at(11) == {
        "epoch/vision_language/all": 11 * 16 / 21, "epoch/text/all": 11 / 7, "epoch/text/texts": 3.0,
        "epoch/image/all": 22 / 5, "epoch/detection/all": 22 / 5,
    }  # fmt: skip
    told = list(itertools.chain(*(epochs.begun(step, step + 1) for step in range(11))))
    assert [line for line in told if "text of texts" in line] == ["step 4: text of texts is in epoch 2 of its 11 rows"]
    assert [line.split(" is in ")[1].split(" of ")[0] for line in told if "detection" in line] == ["epoch 2", "epoch 4"]
    assert Epochs(mixture, ["", ""], 24).at(0)["epoch/image"] == 0
