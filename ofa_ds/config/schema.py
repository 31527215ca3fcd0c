"""The sections of a recipe, typed: what each key means, its default and its range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import Required, TypedDict

from ofa_ds.config.architecture import (
    PRESETS,
    BatchNormMode,
    KernelConfig,
    ModelChange,
    PixelNorm,
    Pixels,
    PresetName,
    Rate,
)
from ofa_ds.config.meaning import MEANING
from ofa_ds.config.values import STRICT, Count, GivenText, Real, Seed, StepWindow, Text, problem_within
from ofa_ds.terms import DOWNSTREAM_TASKS, FAMILIES, NUM_SPECIAL_IDS, PRETRAINING_FAMILIES


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelOptions:
    preset: PresetName = "tiny"
    """Architecture: nano, tiny, medium, base, large, huge, 6b, ... (`ofa_ds.config.architecture.PRESETS`)."""
    change: ModelChange = Field(default_factory=dict)
    """Fields of `ofa_ds.config.architecture.ModelConfig` that differ from the preset's."""
    dropout: Rate = 0.0
    """On embeddings and on the output of attention and feed-forward blocks."""
    attention_dropout: Rate = 0.0
    """On attention probabilities."""
    drop_path: Rate = 0.0
    """Rate of the last layer of each stack; grows linearly from 0; drawn per example."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward instead of keeping its activations."""
    batch_norm: BatchNormMode = "batch"
    """ResNet statistics: from the buffers, from this rank's images, or from the images of all ranks."""
    pixel_norm: PixelNorm = "half"
    """Mean and deviation that pixels are normalised by: 0.5 and 0.5, or those of ImageNet, as that task has them."""

    @field_validator("change")
    @classmethod
    def _without_none(cls, change: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in change.items() if value is not None}  # TOML has no None

    @model_validator(mode="after")
    def _makes_a_model(self) -> ModelOptions:
        try:
            dataclasses.replace(PRESETS[self.preset], **self.change)
        except ValueError as error:
            problem = f"{str(error).removeprefix('model: ')}, in preset {self.preset}"
            raise problem_within("change", problem) from error
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixConfig:
    """Rows drawn from each family, relative to each other; a family the shards lack is left out."""

    vision_language: Count = Field(8, ge=0)
    text: Count = Field(2, ge=0)
    image: Count = Field(1, ge=0)
    detection: Count = Field(1, ge=0)

    @model_validator(mode="after")
    def _something(self) -> MixConfig:
        if not any(self.weights().values()):
            raise ValueError("has only zeros; give at least one family a positive weight")
        return self

    def weights(self) -> dict[str, int]:
        """Weight per family, in the order of PRETRAINING_FAMILIES."""
        return {family: getattr(self, family) for family in PRETRAINING_FAMILIES}


_Weight = Annotated[Count, Field(ge=0)]


@with_config(STRICT)
class MixChange(TypedDict, total=False):
    """Weights of data.mix from step number `step` on; a family that is not named keeps the weight that it had."""

    step: Required[Annotated[Count, Field(ge=2)]]
    vision_language: _Weight
    text: _Weight
    image: _Weight
    detection: _Weight


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSet:
    """One of several directories of shards that a run draws from."""

    shards: GivenText = dataclasses.field(compare=False)
    """Where it lies; what it holds is judged by its fingerprint."""
    weight: Count = Field(1, ge=0)
    """Rows drawn of it, in each family that it has, relative to the other sets that have the family."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskOptions:
    """What a model is fine-tuned on, and how it is asked (docs/finetuning.md)."""

    name: Literal[("", *DOWNSTREAM_TASKS)] = ""
    """One of the downstream tasks; empty for pretraining, whose mix then says what is learnt."""
    prompt: Literal["none", "src", "prev_output"] = "none"
    """What the decoder reads before the answer: nothing, the source with its end, or the source without it."""
    objects: bool = False
    """The row's objects are part of the question."""
    premise: bool = False
    """The row's premise is part of the question."""
    constrained: bool = True
    """Where the answer is one of a list, the loss is over what may come in that list, not over the vocabulary."""
    decoder_noise: Rate = 0.0
    """Share of the previous tokens that training replaces by random ones."""
    max_objects: Count = Field(30, ge=0)
    max_target_tokens: Count = Field(30, ge=1)
    """Of an answer; captions and summaries are measured in words (data.max_target_words)."""
    language: Literal["en", "zh"] = "en"
    """Of the instruction."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    shards: Text = ""
    """Directory made by `ofa-ds shards build`."""
    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], DataSet] = Field(default_factory=dict)
    """Several of them in place of data.shards, by name: they share each family's rows by their weights."""
    max_corrupt: Rate = 0.001
    """Share of the rows seen that may be corrupt, and are replaced by others, before the run stops. 0: none may."""
    vocab: Text = ""
    """Directory of a vocabulary: `ofa-ds vocab train`'s, or OFA's own files."""
    image_size: Pixels = Field(384, ge=16)
    """Side of the pictures of vision-language rows, in pixels."""
    infill_image_size: Pixels = Field(256, ge=16)
    """Side of the pictures of image-infilling and detection rows, in pixels."""
    code_image_size: Pixels = Field(128, multiple_of=8)
    """Side of the central square that image codes describe, in pixels; one code per 8 x 8."""
    max_image_size: Pixels = Field(512, ge=16)
    """Divisor that turns pixels into coordinate bins (docs/ofa.md, Tasks: bins)."""
    sample_patches: Count = Field(196, ge=0)
    """Patches kept of each vision-language picture, drawn without replacement; 0 keeps all."""
    augment: Literal["ofa", "none"] = "ofa"
    """`ofa`: random resize, crop, RandomAugment, scale jitter (docs/ofa.md, Tasks: pictures). `none`: plain resize."""
    decode: Literal["exact", "dct_scaled"] = "exact"
    """`dct_scaled`: JPEGs twice as large as they are needed, or more, are decoded at 1/2, 1/4 or 1/8 of their sides."""
    max_source_words: Count = Field(80, ge=1)
    max_target_words: Count = Field(30, ge=1)
    max_text_tokens: Count = Field(256, ge=1)
    """Tokens of a text-infilling target."""
    extra_confidence: Real = Field(2.0, gt=0)
    """Loss weight of text, image and detection examples (docs/ofa.md, Tasks: text infilling)."""
    mix: MixConfig = MixConfig()
    mix_changes: tuple[MixChange, ...] = ()
    """Other weights from a step on, such as [{step = 5000, text = 4}], in the order of their steps."""
    task: TaskOptions = TaskOptions()
    heldout: Text = ""
    """Shards that `train.evaluate_every` judges."""
    workers: Count = Field(2, ge=0, le=1024)
    """Processes per rank that prepare batches; 0 prepares them in the training process. Never changes a bit."""

    @model_validator(mode="after")
    def _says_each_thing_once(self) -> DataConfig:
        if self.shards and self.sets:
            raise problem_within("sets", 'data.shards names one too; put it among them, and set data.shards=""')
        if self.mix_changes and self.task.name:
            raise problem_within("mix_changes", f"are of pretraining; task.name is {self.task.name}")
        steps = [change["step"] for change in self.mix_changes]
        if any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise problem_within("mix_changes", f"want their steps in order, each once, got {steps}")
        for step, mix in zip(steps, self._mixes()[1:], strict=True):
            if not any(mix.values()):
                raise problem_within("mix_changes", f"from step {step} on all weights are zero")
        return self

    def _mixes(self) -> list[dict[str, int]]:
        """Weights of pretraining's families at first, and after each change."""
        found = [self.mix.weights()]
        for change in self.mix_changes:
            found.append(found[-1] | {name: weight for name, weight in change.items() if name != "step"})
        return found

    def weights(self) -> dict[str, int]:
        """Rows drawn from each family, relative to each other, in the order of FAMILIES; at first."""
        return self._of_families(self.mix.weights())

    def changes(self, global_rows: int) -> list[tuple[int, dict[str, int]]]:
        """(first row of the stream, weights from there on) of each change."""
        starts = [(change["step"] - 1) * global_rows for change in self.mix_changes]
        return list(zip(starts, map(self._of_families, self._mixes()[1:]), strict=True))

    def ever_drawn(self) -> frozenset[str]:
        """Families that have a weight at some time."""
        return frozenset(family for mix in self._mixes() for family, weight in mix.items() if weight)

    def _of_families(self, mix: Mapping[str, int]) -> dict[str, int]:
        if self.task.name:
            return {family: int(family not in mix) for family in FAMILIES}
        return {family: mix.get(family, 0) for family in FAMILIES}

    def check_given(self, wants: str = "want") -> None:
        """Raises ValueError where there is nothing to read."""
        for key in ("shards", "vocab"):
            if not (getattr(self, key) or (key == "shards" and self.sets)):
                raise ValueError(f"data.{key}: {wants} a directory, got none; add data.{key}=DIR")

    def check_sizes(self) -> None:
        """Raises ValueError where the sizes of pictures say against each other."""
        side = max(self.image_size, self.infill_image_size)
        if side > self.max_image_size:
            raise ValueError(
                f"data.max_image_size {self.max_image_size} is less than the pictures' side {side}; coordinates up to "
                f"{side} would have no bin; raise max_image_size to {side}"
            )
        if self.code_image_size > self.infill_image_size:
            raise ValueError(
                f"data.code_image_size {self.code_image_size} is more than data.infill_image_size "
                f"{self.infill_image_size}, whose centre it is"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchConfig:
    global_rows: Count = Field(3072, ge=1)
    """Rows of all families per optimizer step, over all ranks. A vision-language row is two examples, others one."""
    micro_rows: Count = Field(12, ge=1)
    """Rows per rank per forward."""

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank per optimizer step. Raises ValueError where the numbers do not divide."""
        per_forward = self.micro_rows * world_size
        steps, left = divmod(self.global_rows, per_forward)
        if left or not steps:
            raise ValueError(
                f"batch.global_rows {self.global_rows} is not a multiple of batch.micro_rows {self.micro_rows} x "
                f"{world_size} ranks = {per_forward}; use global_rows {max(steps, 1) * per_forward}, "
                f"or change micro_rows"
            )
        return steps


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CriterionConfig:
    """Of fine-tuning, beside optim.label_smoothing (docs/ofa.md, Training: criteria); pretraining has none of it."""

    kind: Literal["cross_entropy", "encouraging", "scst", "clip_scst"] = "cross_entropy"
    drop_worst_ratio: Rate = 0.0
    """Share of a micro-batch's tokens that is left out because its loss is largest."""
    drop_worst_after: Count = Field(0, ge=0)
    """Updates after which that begins."""
    drop_best_ratio: Rate = 0.0
    drop_best_after: Count = Field(0, ge=0)
    rdrop_alpha: Real = Field(0.0, ge=0)
    """Weight of R-Drop: each example twice under different dropout, which are to agree. 0: none."""
    constraint_range: tuple[()] | tuple[Count, Count] = ()
    """[start, end]: the loss is over the special ids and start <= id < end, not over the vocabulary. []: over all, or
    over what data.task.constrained allows. Whether the vocabulary has them is told when the run starts."""
    log_end: Real = Field(0.75, gt=0, le=1)
    """Of the encouraging loss: where its bonus goes on as its tangent; 1 for nowhere."""
    scst_beams: Count = Field(5, ge=2)
    """Of `scst`: hypotheses of each picture that are rewarded; of `clip_scst`: samples of each caption."""
    scst_max_tokens: Count = Field(16, ge=1)
    scst_no_repeat_ngram: Count = Field(3, ge=0)
    scst_document_frequency: Text = ""
    """Of `scst`: a file of document frequencies; those of the training shards where empty."""
    scst_top_k: Count = Field(256, ge=0)
    """Of `clip_scst`: codes are drawn among that many most probable; 0: among all."""
    scst_vqgan: Text = ""
    """Of `clip_scst`: directory of the VQGAN that paints the codes, or "scenes" for their rule."""
    scst_clip: Text = ""
    """Of `clip_scst`: weights of the CLIP that rewards."""

    @field_validator("constraint_range")
    @classmethod
    def _is_a_range(cls, given: tuple[()] | tuple[int, int]) -> tuple[()] | tuple[int, int]:
        if given and not NUM_SPECIAL_IDS <= given[0] < given[1]:
            raise ValueError(f"want [] or [start, end] with {NUM_SPECIAL_IDS} <= start < end")
        return given


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    peak_lr: Real = Field(1e-4, ge=0)
    end_lr: Real = Field(0.0, ge=0)
    warmup_steps: Count = Field(0, ge=0)
    warmup_ratio: Rate = 0.0
    """Share of all steps that warm up, where warmup_steps is 0."""
    freeze: tuple[Literal["token_embedding", "backbone_norms"], ...] = ()
    """Parts that keep the values they begin with: the vocabulary's matrix; statistics, scales and offsets of the
    ResNet's norms, as model.batch_norm = "frozen" has it."""
    weight_decay: Real = Field(0.01, ge=0)
    betas: tuple[Real, Real] = (0.9, 0.999)
    eps: Real = Field(1e-8, gt=0)
    clip_norm: Real = Field(5.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    label_smoothing: Rate = 0.0
    ema_decay: Rate = 0.0
    """Of a moving average of the weights that checkpoints keep beside them; OFA's is 0.9999. 0: none."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("want two numbers in [0, 1)")
        return betas


Changeable = Literal[("data", "vocab", *MEANING)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    num_steps: Count = Field(1000, ge=0)
    """Optimizer steps; the learning rate reaches optim.end_lr at the last."""
    num_epochs: Real = Field(0.0, ge=0)
    """Times that a fine-tuning run sees each row; it then sets num_steps. 0: num_steps counts. A file or a command says
    one of the two; num_steps there takes back the epochs of the recipe that it changes."""
    evaluate_every: Count = Field(0, ge=0)
    """Steps between two judgements of data.heldout, where that is given; the best checkpoint is kept beside the newest.
    0: none."""
    evaluate_rows: Count = Field(1000, ge=1)
    """Rows of data.heldout that are judged, the first."""
    best_metric: Text = ""
    """By which score the best checkpoint is chosen; the task's own where empty (`Task.metric`)."""
    seed: Seed = 1
    """Of weights, order, augmentation and dropout: 0 ... 2^64 - 1."""
    init_from: Text = ""
    """What a new run starts from, without moments, at step 0: the weights of a checkpoint, of a run directory (its
    newest one; RUN_DIR/best), or of another program, in each format of `ofa-ds checkpoint import`."""
    init_changes: tuple[Literal["grow_vocab", "resize_image_positions"], ...] = ()
    """What may be changed of them: rows that data.vocab has more are drawn at random; the tables of image positions are
    resized to the model's grid of patches."""
    accept_changed: tuple[Changeable, ...] = ()
    """What may differ from the run that is gone on with: data, vocab, or a key of `ofa_ds.config.meaning.MEANING`."""
    skip_steps: tuple[Annotated[Count, Field(ge=1)], ...] = ()
    """Numbers of steps, from 1 on, that are passed over: nobody reads their rows, the weights stay as they are."""
    max_bad_steps: Count = Field(10, ge=1)
    """Steps in a row whose loss or gradient may be not finite, or a spike (they are skipped); then the run stops."""
    max_spike_sigma: Real = Field(0.0, ge=0)
    """How far the loss may be above the mean of the last 128, in standard deviations; a step above it is skipped.
    6 is OLMo's. 0: no limit."""
    check_every_steps: Count = Field(0, ge=0)
    """Steps between two looks for silent corruption: bits that ranks hold alike, a micro-batch computed twice. 0: none;
    200 costs less than one per cent."""
    log_every: Count = Field(10, ge=1)
    save_every: Count = Field(1000, ge=1)
    keep: Count = Field(3, ge=1)
    """Checkpoints that stay; older ones are deleted."""
    save_in_background: bool = True
    """Training waits only for a copy of its state (as much host memory again), another process writes it."""
    sample_every: Count = Field(0, ge=0)
    """Steps between pictures of what the model generates, written to TensorBoard; 0 for none."""
    codes_model: Text = ""
    """Directory of the VQGAN that paints image codes there, or "scenes" for their rule; empty: criterion.scst_vqgan,
    and without that some colour each."""
    profile_steps: StepWindow = ""
    """Steps that are traced, "FIRST:LAST" from 1 on, both included, such as "20:25" (docs/running.md, Profiling)."""
    profile_ranks: tuple[Annotated[Count, Field(ge=0)], ...] = (0,)
    """Whose steps are traced; each writes files of its own."""
    memory_snapshot: bool = False
    """On a GPU, remember where each piece of memory was asked for, and write it all down where there is no more."""
    histograms_every: Count = Field(0, ge=0)
    """Steps between histograms of each tensor's weights and gradient moments in TensorBoard; 0 for none."""
    wandb: Text = ""
    """Project of Weights & Biases that the records go to as well, where it is installed; empty for none."""
    calibration: Text = ""
    """A file of `ofa-ds bench` that has the peak of this kind of device, where no data sheet of it is known (MFU)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    run_dir: GivenText = "runs/ofa"
    """Where checkpoints, metrics.jsonl, TensorBoard files and the resolved recipe go."""
    deepspeed: GivenText = "zero3"
    """A file of ds_configs (by name) or a path: memory layout and precision."""
    model: ModelOptions = ModelOptions()
    kernels: KernelConfig = KernelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    criterion: CriterionConfig = CriterionConfig()
    train: TrainConfig = TrainConfig()
