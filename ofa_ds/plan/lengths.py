"""The micro-batch that a recipe's rank sees in the mean: from the mix, the sizes of pictures and lengths of texts.

The lengths are assumptions until somebody measures: `mean_work` and `lengths_of` turn batches of the run's own data
into what a plan takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ofa_ds.config import Recipe
from ofa_ds.config.architecture import ModelConfig, preset
from ofa_ds.plan.work import ExampleShape, ImageGroup, Work
from ofa_ds.terms import PRETRAINING_TASKS

PIXELS_PER_CODE = 8

FAMILY_OF = {
    "caption": "vision_language", "vqa": "vision_language", "itm": "vision_language",
    "visual_grounding": "vision_language", "grounded_caption": "vision_language", "detection": "detection",
    "image_infilling": "image", "text_infilling": "text",
}  # fmt: skip
"""Of the pretraining tasks."""


class TaskLengths(NamedTuple):
    """Means over examples of one task, in tokens, begin and end included."""

    source: float
    target: float
    """What has a loss; a downstream task's decoder prompt comes on top."""
    share: float = 1.0
    """Examples of the task that a row of its family gives."""


@dataclass(frozen=True)
class Lengths:
    """tasks: of pretraining. downstream: of the tasks that a model is fine-tuned on, one of which a recipe names."""

    tasks: Mapping[str, TaskLengths]
    downstream: Mapping[str, TaskLengths]
    about: str
    """Where they are from, for people."""


ASSUMED = Lengths(
    # Measured: both epochs' examples (one of images and detection) of 1,709 vision-language rows (COCO's captions;
    # VQA v2, OK-VQA, A-OKVQA and others' questions; phrases), 332 image and 246 detection rows (COCO, up to 20 boxes),
    # OFA's English vocabulary, the limits of pretrain-base. Shares are those of the rows' types: 678 captions, 526
    # questions, 505 phrases, of each of which two tasks are made. Root mean squares, which pairs go by, are at most 4 %
    # above the means, but for detection's targets (54.8).
    # Text: OFA's rows are documents (the Pile), longer than data.max_text_tokens, which is then the target's length;
    # of its tokens 79.6 % are left in the source (measured: 89.3 of 112.1, 3,655 passages), beside 11 of the question.
    tasks={
        "caption": TaskLengths(8.0, 12.84, 678 / 1709),
        "vqa": TaskLengths(10.88, 2.29, 526 / 1709),
        "itm": TaskLengths(22.38, 2.0, 1204 / 1709),
        "visual_grounding": TaskLengths(20.05, 5.0, 505 / 1709),
        "grounded_caption": TaskLengths(15.0, 10.05, 505 / 1709),
        "detection": TaskLengths(10.0, 44.15),
        "image_infilling": TaskLengths(11.0, 257.0),
        "text_infilling": TaskLengths(214.8, 257.0),
    },
    # Captions and questions as above; the objects of a question, the other tasks: means of the 9 to 26 rows of each of
    # the original's data sets whose samples were recorded for tests. Those were chosen for their edges: measure.
    downstream={
        "caption": TaskLengths(8.0, 12.84), "caption_scst": TaskLengths(8.0, 12.84), "vqa": TaskLengths(28.8, 2.83),
        "refcoco": TaskLengths(24.1, 5.0), "refcocoplus": TaskLengths(24.1, 5.0), "refcocog": TaskLengths(24.1, 5.0),
        "snli_ve": TaskLengths(29.7, 2.0), "cola": TaskLengths(70.3, 1.0), "mnli": TaskLengths(27.3, 1.0),
        "mrpc": TaskLengths(31.3, 1.0), "qnli": TaskLengths(26.9, 1.0), "qqp": TaskLengths(27.3, 1.0),
        "rte": TaskLengths(118.0, 1.0), "sst2": TaskLengths(19.2, 1.0), "imagenet": TaskLengths(8.0, 6.4),
        "gigaword": TaskLengths(25.4, 5.83), "text_to_image": TaskLengths(21.8, 1025.0),
    },
    about="assumed: COCO's captions, questions and boxes; texts as long as data.max_text_tokens",
)  # fmt: skip
"""Of OFA's own data where it is known, else of what was at hand."""

_TEXT_QUESTION = 11.0
"""Tokens of a text-infilling source that are not of the text."""
_LEFT_BY_MASKS = 0.796
"""Share of a text's tokens that its masked form has."""
_WITHOUT_PICTURES = {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "gigaword", "text_to_image"}


def work_of_recipe(recipe: Recipe, lengths: Lengths | None = None) -> Work:
    """The expected micro-batch. lengths: of the run's own data; `ASSUMED` where none are given.

    Of reinforcement (criterion.kind "scst") it is one forward of the pictures and their captions: what is generated and
    how often is not in it. Raises ValueError where lengths lack a task.
    """
    config = preset(recipe.model.preset, **recipe.model.change)
    if recipe.data.task.name:
        return _downstream(recipe, config, lengths or ASSUMED)
    return _pretraining(recipe, config, lengths)


def _pretraining(recipe: Recipe, config: ModelConfig, lengths: Lengths | None) -> Work:
    data, patch = recipe.data, config.patch_size
    weights = data.mix.weights()
    rows = {family: recipe.batch.micro_rows * weight / sum(weights.values()) for family, weight in weights.items()}
    grid, infill_grid = data.image_size // patch, data.infill_image_size // patch
    seen = grid**2 if not 0 < data.sample_patches < grid**2 else data.sample_patches
    patches = {"vision_language": seen, "text": 0, "image": infill_grid**2, "detection": infill_grid**2}
    examples = []
    for task in PRETRAINING_TASKS:
        family = FAMILY_OF[task]
        if not rows[family]:
            continue
        each = _of(task, (lengths or ASSUMED).tasks)
        if lengths is None:
            each = _limited(task, each, recipe)
        each = each._replace(
            source=min(each.source, config.max_positions), target=min(each.target, config.max_positions)
        )
        code = task == "image_infilling"
        count = rows[family] * each.share
        examples.append(ExampleShape(task, patches[family], each.source, each.target, code, count=count))
    images = _groups(
        (data.image_size, data.infill_image_size), (rows["vision_language"], rows["image"] + rows["detection"])
    )
    pictures = sum(each.count for each in examples if FAMILY_OF[each.task] == "vision_language")
    shown = 1 - (1 - seen / grid**2) ** pictures
    distinct = _union(grid, shown, infill_grid if rows["image"] + rows["detection"] else 0)
    return Work(images=images, examples=tuple(examples), distinct=(distinct, *_longest(examples)))


def _limited(task: str, each: TaskLengths, recipe: Recipe) -> TaskLengths:
    """The assumed lengths under the recipe's limits."""
    data = recipe.data
    if task == "text_infilling":
        tokens = data.max_text_tokens
        return each._replace(source=_TEXT_QUESTION + _LEFT_BY_MASKS * tokens, target=tokens + 1)
    if task in ("image_infilling", "text_to_image"):
        return each._replace(target=(data.code_image_size // PIXELS_PER_CODE) ** 2 + 1)
    return each


def _downstream(recipe: Recipe, config: ModelConfig, lengths: Lengths) -> Work:
    """R-Drop shows each example twice, its picture once."""
    data, name = recipe.data, recipe.data.task.name
    each, rows = _of(name, lengths.downstream), float(recipe.batch.micro_rows)
    code = name == "text_to_image"
    if code and lengths is ASSUMED:
        each = _limited(name, each, recipe)
    with_picture = name not in _WITHOUT_PICTURES
    patches = (data.image_size // config.patch_size) ** 2 if with_picture else 0
    prompt = {"none": 0.0, "src": each.source - 1, "prev_output": each.source - 2}[data.task.prompt]
    copies = 2 if recipe.criterion.rdrop_alpha > 0 else 1
    example = ExampleShape(
        name, patches, each.source, prompt + each.target, code, has_loss=each.target, count=rows * copies
    )  # fmt: skip
    images = _groups((data.image_size,), (rows,)) if with_picture else ()
    return Work(images=images, examples=(example,), distinct=(float(patches), *_longest([example])))


def _of(task: str, lengths: Mapping[str, TaskLengths]) -> TaskLengths:
    if task not in lengths:
        known = ", ".join(lengths) or "other tasks"
        raise ValueError(f"lengths of {task}: there are none, only of {known}; measure with that task too")
    return lengths[task]


def _groups(sides: tuple[int, ...], counts: tuple[float, ...]) -> tuple[ImageGroup, ...]:
    """A size that a batch has no picture of is shown a stand-in; of one size twice the first has all pictures."""
    if len(set(sides)) < len(sides):
        counts = (sum(counts), *[0.0] * (len(counts) - 1))
    return tuple(
        ImageGroup(max(count, 1.0), side, side, max(1.0 - count, 0.0))
        for side, count in zip(sides, counts, strict=True)
    )


def _union(grid: int, shown: float, whole: int) -> float:
    """Distinct positions: of a grid each with probability `shown`, of another all; both begin at the same corner."""
    both = min(grid, whole) ** 2
    return shown * (grid**2 - both) + whole**2


def _longest(examples: list[ExampleShape]) -> tuple[float, float, float]:
    """Of sources, of text targets, of runs of codes: positions are those of the longest."""
    return (
        max((each.source for each in examples), default=0.0),
        max((each.target for each in examples if not each.code), default=0.0),
        max((each.target for each in examples if each.code), default=0.0),
    )


def mean_work(works: Iterable[Work]) -> Work:
    """The mean of micro-batches: its sums, pairs included, are the means of theirs, exactly."""
    number = 0
    examples: dict[ExampleShape, float] = defaultdict(float)
    images: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    distinct = [0.0] * 4
    for work in works:
        number += 1
        for example in work.examples:
            examples[example._replace(count=0.0)] += example.count
        for group in work.images:
            sums = images[group.height, group.width]
            sums[0] += group.count
            sums[1] += group.stand_ins
        found = work.distinct or _distinct_of(work)
        distinct = [total + each for total, each in zip(distinct, found, strict=True)]
    if not number:
        raise ValueError("a mean of no micro-batches was asked for")
    return Work(
        images=tuple(ImageGroup(n / number, *size, alone / number) for size, (n, alone) in images.items()),
        examples=tuple(each._replace(count=count / number) for each, count in examples.items()),
        distinct=tuple(each / number for each in distinct),
    )


def _distinct_of(work: Work) -> tuple[float, float, float, float]:
    examples = list(work.examples)
    return max((each.patches for each in examples), default=0.0), *_longest(examples)


def lengths_of(works: Iterable[Work], rows: Mapping[str, float] | None, about: str) -> Lengths:
    """Lengths of other micro-batches of the same data. works: their examples have tasks.

    rows: how many rows of each family the works hold together; None for those of a downstream task, one an example.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 3)
    for work in works:
        for each in work.examples:
            found = (each.count, each.count * each.source, each.count * each.counted)
            sums[each.task] = [total + value for total, value in zip(sums[each.task], found, strict=True)]
    tasks: dict[str, TaskLengths] = {}
    for task, (count, source, target) in sums.items():
        of_family = count if rows is None else rows.get(FAMILY_OF[task], 0.0)
        if count and of_family:
            tasks[task] = TaskLengths(source / count, target / count, count / of_family)
    return Lengths(tasks={} if rows is None else tasks, downstream=tasks if rows is None else {}, about=about)
