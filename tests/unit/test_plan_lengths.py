"""The micro-batch that a recipe is planned for, and means of batches that were seen."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from tiny_sources import write_sources

from ofa_ds.batch import Batch
from ofa_ds.config import Recipe, load_recipe
from ofa_ds.config.recipe import shipped_recipes
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.plan.flops import flops
from ofa_ds.plan.lengths import ASSUMED, FAMILY_OF, lengths_of, mean_work, work_of_recipe
from ofa_ds.plan.work import ExampleShape, ImageGroup, Work, work_of
from ofa_ds.tasks.task import DOWNSTREAM, TABLE, sides_of
from ofa_ds.terms import DOWNSTREAM_TASKS, PRETRAINING_TASKS, TASKS
from ofa_ds.train.loader import Loader

EXACT = 1e-9


def sums(work: Work) -> list[float]:
    pictures = [(g.count, g.stand_ins) for g in sorted(work.images, key=lambda g: (g.height, g.width))]
    return [
        work.num_examples, work.encoder_tokens, work.decoder_tokens, work.counted_tokens, work.tokens, *work.pairs,
        *(number for pair in pictures for number in pair),
    ]  # fmt: skip


def test_families_and_pictures_are_those_of_the_tasks():
    assert {name: task.family for name, task in TABLE.items()} == FAMILY_OF
    assert set(ASSUMED.tasks) == set(PRETRAINING_TASKS) and set(ASSUMED.downstream) == set(DOWNSTREAM_TASKS)
    for name, task in DOWNSTREAM.items():
        work = work_of_recipe(load_recipe("finetune-caption-nano", [f"data.task.name={name}"]))
        assert bool(work.images) == task.needs_picture, name


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_has_a_micro_batch(name):
    recipe = load_recipe(name)
    work = work_of_recipe(recipe)
    assert work.encoder_tokens > 0 and work.decoder_tokens > 0 and work.counted_tokens <= work.decoder_tokens
    assert [group.height for group in work.images] == list(sides_of(recipe.data))
    assert all(group.count >= 1 and group.stand_ins <= 1 for group in work.images)
    assert all(number >= 0 for number in work.distinct)


def test_rows_are_mixed_as_the_recipe_says():
    recipe = load_recipe("pretrain-base", ["batch.micro_rows=24"])  # 8 + 2 + 1 + 1 of 12
    work = work_of_recipe(recipe)
    counts = {each.task: each.count for each in work.examples}
    assert sum(count for task, count in counts.items() if FAMILY_OF[task] == "vision_language") == pytest.approx(32)
    assert counts["text_infilling"] == 4 and counts["image_infilling"] == counts["detection"] == 2
    assert [(each.count, each.height) for each in work.images] == [(16, 384), (4, 256)]
    patches = {each.task: each.patches for each in work.examples}
    assert patches["caption"] == 196 and patches["detection"] == 256 and patches["text_infilling"] == 0


def test_limits_of_the_recipe_bound_the_texts():
    def target(*overrides: str) -> dict[str, float]:
        work = work_of_recipe(load_recipe("pretrain-base", overrides))
        return {each.task: each.target for each in work.examples}

    assert target("data.max_text_tokens=100")["text_infilling"] == 101
    assert target("data.code_image_size=64")["image_infilling"] == 65
    short = target("model.change={max_positions = 40}", "data.code_image_size=32")
    assert max(short.values()) == 40


def test_a_picture_size_that_no_row_has_is_a_stand_in():
    overrides = ["data.mix.image=0", "data.mix.detection=0"]
    groups = work_of_recipe(load_recipe("pretrain-base", overrides)).images
    assert [(each.count, each.stand_ins) for each in groups] == [(48 * 8 / 10, 0), (1, 1)]
    same = work_of_recipe(load_recipe("pretrain-base", ["data.infill_image_size=384"])).images
    assert [(each.count, each.stand_ins) for each in same] == [(48 * 10 / 12, 0), (1, 1)]


def test_r_drop_shows_an_example_twice_and_its_picture_once():
    plain, dropped = (
        work_of_recipe(load_recipe("finetune-caption-base", [f"criterion.rdrop_alpha={alpha}"])) for alpha in (0.0, 1.0)
    )
    assert dropped.num_examples == 2 * plain.num_examples and dropped.images == plain.images


def test_what_the_decoder_is_asked_has_no_loss():
    work = work_of_recipe(load_recipe("finetune-mnli-base"))
    (example,) = work.examples
    assert example.target == example.source - 1 + example.counted and work.counted_tokens == work.num_examples


def random_work(rng: random.Random) -> Work:
    examples = []
    for _ in range(rng.randint(1, 5)):
        task, source, target = rng.choice(("caption", "vqa")), rng.randint(3, 9), rng.randint(2, 9)
        examples.append(ExampleShape(task, 9, source, target, has_loss=target - 1, count=rng.choice((1.0, 2.0, 0.5))))
    images = (ImageGroup(rng.randint(1, 3), 48, 48), ImageGroup(1, 32, 32, rng.randint(0, 1)))
    return Work(images=images, examples=tuple(examples), distinct=(9, rng.randint(3, 9), 7, 0))


def test_a_mean_of_batches_has_the_means_of_their_sums():
    works = [random_work(random.Random(seed)) for seed in range(20)]
    means = [sum(values) / len(works) for values in zip(*map(sums, works), strict=True)]
    assert sums(mean_work(works)) == pytest.approx(means, rel=EXACT)
    assert mean_work(works).distinct == pytest.approx([9, sum(work.distinct[1] for work in works) / 20, 7, 0])


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a mean of no micro-batches"):
        mean_work([])


def test_lengths_that_were_measured_give_the_batch_back():
    recipe = load_recipe("pretrain-base", ["data.mix.text=0"])
    work = work_of_recipe(recipe)
    longer = tuple(each._replace(source=each.source + 3, target=each.target + 5) for each in work.examples)
    seen = dataclasses.replace(work, examples=longer)
    rows = {"vision_language": 48 * 8 / 10, "image": 4.8, "detection": 4.8}
    found = lengths_of([seen, seen], {family: 2 * number for family, number in rows.items()}, "measured")
    assert sums(work_of_recipe(recipe, found)) == pytest.approx(sums(seen), rel=EXACT)
    asked = load_recipe("finetune-caption-base")
    own = lengths_of([Work(images=(), examples=(ExampleShape("caption", 4, 8, 9, count=7),))], None, "measured")
    assert work_of_recipe(asked, own).decoder_tokens == 9 * asked.batch.micro_rows


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> tuple[Recipe, ModelConfig, list[Batch]]:
    """40 micro-batches of the loader."""
    folder = tmp_path_factory.mktemp("lengths")
    build_shards(folder / "shards", **write_sources(folder), workers=1)
    texts = [f" what does the image describe? a cat {i} on a mat and the dog" for i in range(50)]
    train_vocab(texts, 300, folder / "vocab", num_codes=8, num_bins=1000)
    sizes = ["data.image_size=64", "data.infill_image_size=32", "data.code_image_size=16", "data.sample_patches=8"]
    rows = ["batch.global_rows=48", "batch.micro_rows=12", "data.workers=0"]
    recipe = load_recipe("pretrain-nano", [*sizes, *rows, "data.mix={vision_language=8, text=2, image=1, detection=1}"])
    vocab = load_vocab(folder / "vocab")
    config = model_config(recipe, vocab.size)
    loader = Loader(
        shards=Shards(folder / "shards"), vocab=vocab, config=recipe.data, batch=recipe.batch, model=config, seed=1
    )
    return recipe, config, [batch for step in itertools.islice(loader.steps(), 10) for batch in step]


def test_measured_lengths_plan_the_operations_of_real_batches(batches):
    recipe, config, found = batches
    works = []
    for batch in found:
        places = batch.places
        shapes = [tuple(each.shape) for each in batch.images]
        axes = (batch.encoder_offsets, batch.num_patches, batch.decoder_offsets, batch.code_mask)
        work = work_of(shapes, *(each.tolist() for each in axes), len(places.counted))
        named = zip(work.examples, batch.task.tolist(), strict=True)
        distinct = (places.image_positions, places.text_positions, places.decoder_texts, places.decoder_codes)
        works.append(
            dataclasses.replace(
                work, examples=tuple(each._replace(task=TASKS[index]) for each, index in named),
                distinct=tuple(float(len(each)) for each in distinct),
            )
        )  # fmt: skip
    mean = sum(flops(config, work).useful for work in works) / len(works)
    assert flops(config, mean_work(works)).useful == pytest.approx(mean, rel=1e-4)
    rows = {"vision_language": 320, "text": 80, "image": 40, "detection": 40}
    planned = work_of_recipe(recipe, lengths_of(works, rows, "measured"))
    assert sums(planned)[:5] == pytest.approx(sums(mean_work(works))[:5], rel=1e-6)
    assert [(g.count, g.height) for g in planned.images] == [(8, 64), (2, 32)]
    assert planned.distinct[0] == pytest.approx(mean_work(works).distinct[0], rel=0.01)
    assert flops(config, planned).useful == pytest.approx(mean, rel=0.005)


def test_lengths_that_lack_a_task_say_which():
    recipe = load_recipe("pretrain-base")
    found = lengths_of([work_of_recipe(load_recipe("pretrain-base", ["data.mix.text=0"]))], {"image": 1.0}, "measured")
    with pytest.raises(ValueError, match="lengths of caption: there are none, only of image_infilling"):
        work_of_recipe(recipe, found)
