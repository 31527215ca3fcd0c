"""How a model is asked: as it was fine-tuned, or about a task that it was not fine-tuned on; and how it answers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ofa_ds.config import TaskOptions, changed_recipe
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.inference.answering import answer
from ofa_ds.inference.loaded_model import LoadedModel, Precision, Told, generated, untold
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.kind import Decoding, Task
from ofa_ds.tasks.task import DOWNSTREAM, DOWNSTREAM_FAMILY
from ofa_ds.tasks.task_shards import tasks_of

_OPTIONS = {"data.task.name": "--task", "data.shards": "--shards", "data.heldout": "--shards", "data.vocab": "--vocab"}
"""Settings that have an option of their own here."""

_LIMITS = ("max_source_words", "max_target_words")
"""Settings of a task that have nothing to do with how a model was trained."""


@dataclass(frozen=True, kw_only=True)
class How:
    """What a user says of how answers are found; nothing: as the task says."""

    beams: int | None = None
    search: Literal["", "all", "beam", "open"] = ""
    """Every candidate scored; beams that stay inside the list of answers; beams that may give any."""
    settings: tuple[str, ...] = ()
    """KEY=VALUE of the recipe's [data], such as data.task.prompt=prev_output."""
    samples: int = 1
    """Of tasks that paint: pictures of each caption, of which the best are told too."""
    precision: Precision = "auto"
    """Of weights and arithmetic, but for sums, norms' statistics and probabilities."""

    def decoding(self, task: Task, ctx: Context) -> tuple[Decoding, Candidates | None]:
        """How `task` is answered, and among which answers: all texts, where it was trained so and nobody says else.

        Raises ValueError for all candidates, or beams among them, without a list.
        """
        candidates = ctx.candidates if self.search or ctx.config.task.constrained else None
        decoding = task.decoding if self.beams is None else dataclasses.replace(task.decoding, beams=self.beams)
        listed = self.search == "all" or (self.search == "beam" and task.candidates != "none")
        if listed and candidates is None:
            files = "; build the shards with --answers FILE" if task.candidates == "file" else ""
            raise ValueError(f"--decoding {self.search}: {task.name} has no list of answers here{files}")
        if self.search:
            decoding = dataclasses.replace(decoding, candidates=self.search == "all")
        return decoding, None if self.search == "open" else candidates


AS_THE_TASK_SAYS = How()


def check_list(trained: LoadedModel, ctx: Context, task: Task, how: How, give: str) -> None:
    """Raises ValueError where a model that learned to answer from a list would be asked without one.

    trained: the model with its own recipe. ctx: of what is asked. give: what the user can do.
    """
    learned = trained.recipe.data.task
    from_list = learned.name == task.name and learned.constrained and task.candidates == "file"
    if from_list and ctx.config.task.constrained and ctx.candidates is None and not how.search:
        raise ValueError(
            f"{trained.path or task.name}: learned to answer {task.name} from a list, and there is none here; {give}, "
            "or search among all texts with --decoding open"
        )


def asked_as(model: LoadedModel, name: str, how: How = AS_THE_TASK_SAYS) -> LoadedModel:
    """The model with the settings that downstream task `name` is asked with.

    Those of its recipe where it was fine-tuned on it; else zero-shot: pictures as it knows them, no decoder prompt, no
    objects, no premise. `how.settings` come on top. Raises ValueError where these are wrong.
    """
    recipe = model.recipe
    if recipe.data.task.name != name:
        limits = {key: value for key, value in DOWNSTREAM[name].settings.items() if key in _LIMITS}
        options = TaskOptions(name=name, language=recipe.data.task.language)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, task=options, **limits))
    return with_settings(dataclasses.replace(model, recipe=recipe), how.settings)


def with_settings(model: LoadedModel, settings: Sequence[str]) -> LoadedModel:
    """The model with KEY=VALUE over its recipe's [data], or model.pixel_norm, which foreign files do not tell; `model`
    itself normalises so from then on. Raises ValueError for another key, or a wrong value."""
    if wrong := next((each for each in settings if not each.startswith(("data.", "model.pixel_norm="))), None):
        raise ValueError(f"{wrong}: want data.KEY=VALUE or model.pixel_norm, as the model's weights are what they are")
    if named := next((each for each in settings if each.partition("=")[0].strip() in _OPTIONS), None):
        raise ValueError(f"{named}: is said with {_OPTIONS[named.partition('=')[0].strip()]}")
    if not settings:
        return model
    recipe = changed_recipe(model.recipe, settings, model.path or "the model's recipe")
    encoder = model.model.encoder
    encoder.config = dataclasses.replace(encoder.config, pixel_norm=recipe.model.pixel_norm)
    return dataclasses.replace(model, recipe=recipe)


def downstream_tasks(model: LoadedModel, shards: Shards, names: Sequence[str] | None) -> list[str]:
    """The tasks that these downstream shards are asked about: those named, the model's own, else the first they have.

    Raises ValueError: a task that has no rows here, or a model that was fine-tuned on another and no task named.
    """
    here, trained = tasks_of(shards), model.recipe.data.task.name
    if not here:
        raise ValueError(f"{shards.path}: has rows of pretraining, want those of {', '.join(names or [trained])}")
    if names is None:
        if not trained:
            print(f"{here[0]}: zero-shot, as the model was not fine-tuned", file=sys.stderr)
        names = [trained or here[0]]
    for name in names:
        if name not in here:
            named = f"; the model was fine-tuned on {name}, --task says otherwise" if name == trained else ""
            raise ValueError(f"{shards.path}: has no row for {name}, but for {', '.join(here)}{named}")
    return list(names)


def answers_to(
    model: LoadedModel, ctx: Context, task: Task, examples: Sequence[Example], how: How = AS_THE_TASK_SAYS,
    told: Told = untold, max_tokens: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Generated ids of each example, without bos, prompt and eos.

    max_tokens: of pretraining tasks, as `generated` takes it.
    """
    if task.family != DOWNSTREAM_FAMILY:
        if how.search:
            raise ValueError(f"--decoding {how.search}: {task.name} is a task of pretraining, whose answers are open")
        return generated(model, examples, beam=how.beams or 1, max_tokens=max_tokens, told=told)
    decoding, candidates = how.decoding(task, ctx)
    return answer(model, examples, task, candidates=candidates, decoding=decoding, told=told)
