"""What every downstream task makes of a row, whatever the row and the options: prompts, answers, limits, draws."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ofa_ds.config import ModelOptions, Recipe
from ofa_ds.data.columns import SCHEMAS, from_columns
from ofa_ds.data.example import Example
from ofa_ds.data.image import decode, resize
from ofa_ds.data.text import clean_caption
from ofa_ds.data.vocab import Vocab, train_vocab
from ofa_ds.inference.answering import answer
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.kind import Task
from ofa_ds.tasks.preview import describe
from ofa_ds.tasks.task import DOWNSTREAM, NO_NEGATIVES, ask, candidates_of, context_of, data_config_of, row_texts
from ofa_ds.terms import NUM_SPECIAL_IDS, PAD_ID

SIDE = 32
ANSWERS = ("red", "red and white", "red wine", "two dogs", "a")
WORDS = ("A", "cat", "two", "Dogs,", "it's", "12", "red", "and", "white", "-", "<unk>", "é")
TASKS = pytest.mark.parametrize("task", DOWNSTREAM.values(), ids=DOWNSTREAM)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    texts = [" what does the image describe? a cat and two dogs, it's red and white wine. yes no maybe"] * 20
    return train_vocab(texts, 420, tmp_path_factory.mktemp("vocab") / "v", num_codes=64, num_bins=1000)


def picture(height: int = 40, width: int = 56) -> bytes:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def row_of(task: Task, **fields: Any) -> dict[str, Any]:
    """A row of a task that has all that its rows may have."""
    row: dict[str, Any] = {
        "id": "7", "image": b"", "width": 0, "height": 0, "image_id": "i", "text": "Two dogs?", "text_pair": "a cat",
        "answers": [], "box": None, "objects": ["cat", "red dog"], "type": task.row_types[0],
    }  # fmt: skip
    if task.needs_picture:
        row |= {"image": picture(), "width": 56, "height": 40}
    if "codes" in task.columns:
        row["answers"] = [("0 5 63 7", 1.0)]
    elif "box" in task.columns:
        row["box"] = (5.0, 6.0, 30.5, 39.0)
    elif task.labels:
        row["answers"] = [(next(iter(task.labels.values())), 1.0)]
    else:
        row["answers"] = [("a", 0.3), ("red and white", 0.9), ("red wine", 0.9)]
    return row | fields


def context(of: Task, vocab: Vocab, *, positions: int = 1024, train: bool = True, **options: Any) -> Context:
    config = data_config_of(of.name, **{"image_size": SIDE, "code_image_size": 16} | options)
    return Context(
        vocab=vocab, negatives=NO_NEGATIVES, config=config, patch_size=16, max_positions=positions,
        split="train" if train else "heldout", candidates=candidates_of(of.name, ANSWERS, vocab),
    )  # fmt: skip


def build(task: Task, ctx: Context, row: dict[str, Any], seed: int = 0) -> Example:
    return dataclasses.replace(task.build(row, None, np.random.default_rng(seed), ctx), task=task.name)


some_text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=200).map(" ".join)
some_words = some_text.map(lambda text: f"so {text}")
"""Not marks alone: a premise of nothing else is refused."""
prompts = st.sampled_from(["none", "src", "prev_output"])


def test_the_row_of_these_tests_is_one_that_shards_give() -> None:
    columns = {field.name: [] for field in SCHEMAS["downstream"]} | {"box": [float("nan")] * 4}
    given_back = from_columns("downstream", columns)
    assert all(set(row_of(task)) == set(given_back) for task in DOWNSTREAM.values())


@TASKS
def test_the_value_of_a_task_says_all_that_the_others_read(task: Task) -> None:
    assert task.family == "downstream" and task.row_types and task.metric and task.judge and task.hand_in
    assert task.width > max(task.columns.values()) and task.settings.keys()
    assert ("image" in task.columns) == task.needs_picture
    assert bool(task.labels) == ("label" in task.columns) == (task.candidates == "labels")
    assert task.decoding.candidates == (task.candidates != "none")
    assert data_config_of(task.name).task.name == task.name
    assert data_config_of(task.name, task={"prompt": "none"}, image_size=64).task.prompt == "none"


@TASKS
@given(text=some_text, pair=some_words, prompt=prompts, positions=st.integers(8, 200), train=st.booleans())
@settings(max_examples=12, deadline=None)
def test_an_example_is_a_prompt_and_an_answer_within_the_positions(
    bpe: Vocab, task: Task, text: str, pair: str, prompt: str, positions: int, train: bool
) -> None:
    prompt = "none" if task.decoding.codes else prompt
    ctx = context(task, bpe, positions=positions, train=train, task={"prompt": prompt, "decoder_noise": 0.0})
    row = row_of(task, text=text, text_pair=pair)
    example = build(task, ctx, row)
    whole = build(task, dataclasses.replace(ctx, max_positions=100_000), row)
    assert len(example.source) <= positions >= len(example.prev) and len(example.prev) == len(example.target)
    assert example.source[0] == bpe.bos and example.source[-1] == bpe.eos == (example.target[-1] if task.ends else 2)
    assert example.cut == (len(whole.source) > len(example.source) or len(whole.target) > len(example.target))
    assert whole.source[: len(example.source) - 1].tolist() == example.source[:-1].tolist()
    wanted = {"none": [], "src": example.source[1:], "prev_output": example.source[1:-1]}[prompt]
    assert example.prompt.tolist() == list(wanted)
    size = len(example.prompt)
    assert (example.target[:size] == PAD_ID).all() and (example.target[size:] != PAD_ID).all()
    assert example.prev[: size + 1].tolist() == [bpe.bos, *example.prompt]
    assert example.prev[size + 1 :].tolist() == example.target[size:-1].tolist()
    assert describe(example, ctx)


@TASKS
def test_what_a_user_asks_is_worded_as_in_training(bpe: Vocab, task: Task) -> None:
    ctx = context(task, bpe, train=False)
    row = row_of(task, answers=[], box=None, objects=[])
    told = "\t".join(row[column] for column in ("text", "text_pair") if column in task.columns)
    pixels = decode(row["image"]) if task.needs_picture else None
    asked, built = ask(ctx, task.name, pixels, told), build(task, ctx, row)
    for name in ("source", "prompt", "target", "prev"):
        assert getattr(asked, name).tolist() == getattr(built, name).tolist(), name
    assert (asked.image is None) == (built.image is None) == (not task.needs_picture)
    assert asked.image is None or np.array_equal(asked.image, built.image)
    assert asked.picture_size == built.picture_size


@pytest.mark.parametrize(
    "name, text, want",
    [
        ("mnli", "a man sleeps", "two sentences with a tab between"),
        ("rte", "a man sleeps\t ", "two sentences"),
        ("qqp", "a\tb\tc", "two sentences"),
        ("cola", "a\tb", "one sentence, without a tab"),
        ("snli_ve", "a man sleeps", "two sentences"),
        ("snli_ve", "\tthere is a man", "two sentences"),
    ],
)
def test_a_question_with_a_sentence_too_few_or_too_many_is_refused(bpe: Vocab, name: str, text: str, want: str) -> None:
    ctx = context(DOWNSTREAM[name], bpe, train=False)
    with pytest.raises(ValueError, match=f"--text: want {want}"):
        ask(ctx, name, decode(row_of(DOWNSTREAM["snli_ve"])["image"]), text)


def test_a_row_without_the_premise_that_is_asked_for_is_refused(bpe: Vocab) -> None:
    row = row_of(DOWNSTREAM["snli_ve"], text_pair="")
    with pytest.raises(ValueError, match=r"no premise.*data\.task\.premise=false"):
        build(DOWNSTREAM["snli_ve"], context(DOWNSTREAM["snli_ve"], bpe, task={"premise": True}), row)
    assert build(DOWNSTREAM["snli_ve"], context(DOWNSTREAM["snli_ve"], bpe, task={"premise": False}), row)


@TASKS
@given(text=some_text, pair=some_text)
@settings(max_examples=8, deadline=None)
def test_a_vocabulary_is_trained_on_every_text_that_a_model_meets(bpe: Vocab, task: Task, text: str, pair: str) -> None:
    assume(clean_caption(pair) or task.name != "snli_ve")  # it refuses a premise of signs alone
    options = {"objects": True, "premise": True}
    ctx = context(task, bpe, max_source_words=10_000, max_target_words=10_000, task=options)
    row = row_of(task, text=text, text_pair=pair)
    example, known = build(task, ctx, row), row_texts("downstream", row)
    assert example.source_text in ("".join(known[:2]), *known)
    assert {"box", "codes"} & set(task.columns) or example.target_text in known


@TASKS
def test_a_row_without_what_is_right_is_asked_and_answered(bpe: Vocab, task: Task) -> None:
    """Rows to predict: with every prompt, by candidates and by beams, also where the answers are no list."""
    torch.manual_seed(0)
    config = data_config_of(task.name, image_size=SIDE, infill_image_size=SIDE, code_image_size=SIDE)
    recipe = Recipe(model=ModelOptions(preset="nano"), data=config)
    loaded = LoadedModel(model=OFA(model_config(recipe, bpe.size)).eval(), vocab=bpe, recipe=recipe)
    row = row_of(task, answers=[], box=None)
    for prompt in ("none", "src", "prev_output")[: 1 if task.decoding.codes else 3]:
        ctx = context(task, bpe, train=False, task={"prompt": prompt})
        example = build(task, ctx, row)
        assert example.references == () and example.region is None
        longest = 4 if ctx.candidates is None else max(map(len, ctx.candidates.ids))
        short = dataclasses.replace(task.decoding, max_len=longest, beams=2)
        for decoding in (short, dataclasses.replace(short, candidates=False)):
            (found,) = answer(loaded, [example], task, candidates=ctx.candidates, decoding=decoding)
            if ctx.candidates is not None:
                assert tuple(found) in ctx.candidates.ids
        assert len(task.hand_in(ctx, [example], [found])) == 1


@given(text=st.sampled_from(ANSWERS), limit=st.integers(1, 6), prompt=prompts, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_answer_of_the_list_always_has_a_chance(bpe: Vocab, text: str, limit: int, prompt: str, seed: int) -> None:
    """Whatever the limit of tokens: every token with loss is among those that may come, eos too."""
    task = DOWNSTREAM["vqa"]
    ctx = context(task, bpe, task={"max_target_tokens": limit, "prompt": prompt})
    example = build(task, ctx, row_of(task, answers=[(text, 1.0)]), seed)
    assert len(example.allowed) == len(example.target)
    for token, allowed in zip(example.target, example.allowed, strict=True):
        assert (token in allowed) if token != PAD_ID else not len(allowed)
    free = context(task, bpe, task={"max_target_tokens": limit, "prompt": prompt, "constrained": False})
    open_ended = build(task, free, row_of(task, answers=[(text, 1.0)]), seed)
    assert not open_ended.allowed and len(open_ended.target) - len(open_ended.prompt) <= limit + 1


def test_decoder_noise_replaces_tokens_of_the_answer_at_its_rate_in_training_alone(bpe: Vocab) -> None:
    task, changed, total = DOWNSTREAM["gigaword"], 0, 0
    row = row_of(task, answers=[(" ".join(WORDS * 4), 1.0)])
    for seed in range(60):
        ctx = context(task, bpe, task={"prompt": "prev_output"})
        noisy = build(task, ctx, row, seed)
        clean = build(task, dataclasses.replace(ctx, split="heldout"), row, seed)
        assert ctx.config.task.decoder_noise == 0.2 and noisy.target.tolist() == clean.target.tolist()
        answer_at = 1 + len(noisy.prompt)
        assert noisy.prev[:answer_at].tolist() == clean.prev[:answer_at].tolist()
        assert clean.prev[answer_at:].tolist() == clean.target[answer_at - 1 : -1].tolist()
        other = noisy.prev[answer_at:] != clean.prev[answer_at:]
        assert (noisy.prev[answer_at:] >= NUM_SPECIAL_IDS).all() and (noisy.prev < bpe.code_start).all()
        changed, total = changed + other.sum(), total + len(other)
    assert abs(changed / total - 0.2) < 0.02


def test_the_best_answer_is_learnt_and_its_confidence_weighs_the_loss(bpe: Vocab) -> None:
    task = DOWNSTREAM["vqa"]
    example = build(task, context(task, bpe), row_of(task))
    assert (example.target_text, example.conf) == (" red and white", 0.9)  # the first of two that are as sure
    assert example.references == (("a", 0.3), ("red and white", 0.9), ("red wine", 0.9))


def test_every_caption_of_a_row_is_drawn_alike_often(bpe: Vocab) -> None:
    task = DOWNSTREAM["caption"]
    row = row_of(task, answers=[("One cat.", 1.0), ("two dogs!", 1.0), ("a, red wine", 1.0), (" ?! ", 1.0)])
    ctx = context(task, bpe)
    drawn = [build(task, ctx, row, seed).target_text for seed in range(300)]
    assert set(drawn) == {" One cat", " two dogs", " a red wine"}
    assert all(70 < drawn.count(text) < 130 for text in set(drawn))
    held_out = build(task, dataclasses.replace(ctx, split="heldout"), row)
    assert held_out.target_text == " One cat" and len(held_out.references) == 4


@given(
    width=st.integers(1, 900), height=st.integers(1, 900), side=st.sampled_from([32, 480, 512]),
    shares=st.tuples(*[st.floats(-0.2, 1.2)] * 4),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_box_is_four_bins_that_lead_back_to_it_within_half_a_bin(
    bpe: Vocab, width: int, height: int, side: int, shares: tuple[float, ...]
) -> None:
    """Whatever the picture's size and the network's: over 512 pixels, at the edge where the box goes past it."""
    task = DOWNSTREAM["refcoco"]
    box = tuple(float(np.float32(share * size)) for share, size in zip(shares, (width, height) * 2, strict=True))
    row = row_of(task, image=b"", width=width, height=height, box=box)
    ctx = dataclasses.replace(context(task, bpe), config=data_config_of("refcoco", image_size=side))
    example = build(task, ctx, row)
    pixels = (example.target[:4] - bpe.bin_start) * 512 / 999 / side * np.array([width, height] * 2)
    wanted = np.clip(box, 0, [width, height] * 2)
    assert np.abs(pixels - wanted).max() <= 0.51 * 512 / 999 / side * max(width, height)
    assert len(example.target) == 5 and all(bpe.is_bin(token) for token in example.target[:4])
    assert example.region == box and example.picture_size == (width, height)


@TASKS
def test_a_picture_is_seen_whole_and_square_and_of_imagenet_augmented_in_training(bpe: Vocab, task: Task) -> None:
    if not task.needs_picture:
        return
    row = row_of(task)
    whole = resize(decode(row["image"]), SIDE, SIDE)
    assert np.array_equal(build(task, context(task, bpe, train=False), row).image, whole)
    assert np.array_equal(build(task, context(task, bpe, augment="none"), row).image, whole)
    seen = [build(task, context(task, bpe), row, seed).image for seed in (1, 1, 2)]
    assert all(image.shape == (SIDE, SIDE, 3) for image in seen) and np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2]) == np.array_equal(seen[0], whole) == (task.name != "imagenet")


def test_a_question_of_a_user_has_the_candidates_of_its_task_only_where_they_are_labels(bpe: Vocab) -> None:
    for name, task in DOWNSTREAM.items():
        ctx = context_of(None, bpe, data_config_of(name), patch_size=16, max_positions=64)
        assert (ctx.candidates is not None) == (task.candidates == "labels")
        if task.labels:
            assert set(ctx.candidates.answers) == set(task.labels.values())
