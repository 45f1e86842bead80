"""How networks are trained and distilled: ``teacher.train`` and the section ``distill``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from edgekd.config.base import ConfigModel, PositiveFloat, PositiveInt, current_loss


class Schedule(ConfigModel):
    """A number that changes from ``start`` to ``end`` and then stays constant: ``{start: 0, end: 8,
    over: 0.1}`` is a warm-up over the first tenth of the training.
    """

    start: float
    """First value."""
    end: float
    """Last value."""
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training over which it changes."""
    shape: Literal["linear", "cosine"] = "linear"
    """Shape of the course between them."""

    def at(self, part: float) -> float:
        """Its value after the share ``part`` of the training, from 0 to 1."""
        share = min(1.0, part / self.over)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


class TrainConfig(ConfigModel):
    """How a network is trained; the same keys for teacher, student and distillation."""

    epochs: PositiveInt = 10
    """Passes over the training split."""
    batch_size: PositiveInt = 128
    """Samples of a batch."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """``sgd`` (with Nesterov momentum) or ``adamw``."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of ``sgd``."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay."""
    schedule: Literal["constant", "cosine", "one-cycle"] = "one-cycle"
    """Course of the learning rate over the steps."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which the learning rate rises from almost 0, for ``constant`` and
    ``cosine``; ``one-cycle`` has its own.
    """
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient. Left out: not clipped."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which are then
    validated and saved. Left out: no average.
    """
    accumulate: PositiveInt = 1
    """Number of batches per optimizer step (gradient accumulation)."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of forward and backward passes (automatic mixed precision)."""
    compile: bool = False
    """Whether ``torch.compile`` is used."""
    patience: PositiveInt | None = None
    """Stop after this many epochs without a better validation. Left out: never early."""
    channels_last: bool = True
    """Whether images are in channels-last memory format, which is faster for convolutions."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the probability spread evenly over all classes by the loss on hard labels."""


def _one_name(value: Any, kind: str, example: str, other_keys: tuple[str, ...] = ()) -> Any:
    """``name`` or ``{name: {arguments}, …}`` as written in YAML, as a mapping with the two keys."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or not value or "name" in value:
        return value
    names = [key for key in value if key not in other_keys]
    if len(names) != 1:
        found = ", ".join(map(str, names)) or "none"
        raise ValueError(f"{kind} names one thing, e.g. {example}; here: {found}")
    rest = {key: value[key] for key in other_keys if key in value}
    return {"name": names[0], "args": value[names[0]] or {}, **rest}


class LossTerm(ConfigModel):
    """One term of the objective: ``{soft_labels: {temperature: 4}, weight: 0.9}``.

    The arguments ``student`` and ``teacher`` name the layers it compares (a list of them for
    several pairs); without them it compares the primary outputs. The weight, and any number among
    the arguments, may be a :class:`Schedule`.
    """

    name: str
    """A built-in loss, or ``package.module:name``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the loss, and the layers it compares."""
    weight: Annotated[float, Field(ge=0)] | Schedule = 1.0
    """Factor of this term."""

    @field_validator("weight")
    @classmethod
    def _never_negative(cls, value: float | Schedule) -> float | Schedule:
        if isinstance(value, Schedule) and min(value.start, value.end) < 0:
            raise ValueError("a weight below 0 would drive the student away from the teacher")
        return value

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        example = "{soft_labels: {temperature: 4}, weight: 0.9}"
        return current_loss(_one_name(value, "a loss term", example, ("weight",)))


_Entries = TypeVar("_Entries", bound=tuple[Any, ...])


def _one_or_more(terms: _Entries) -> _Entries:
    if not terms:
        raise ValueError("no loss is named: add one, such as soft_labels")
    return terms


Recipe = Annotated[tuple[LossTerm, ...], AfterValidator(_one_or_more)]
"""The loss terms of one objective."""


class AutoSettings(ConfigModel):
    """Section ``distill.losses.auto``: recipes are raced with the cached teacher by successive
    halving on validation data, and the student is trained with the best one (the extra ``search``).
    """

    recipes: Annotated[tuple[Recipe, ...], AfterValidator(_one_or_more)] | None = None
    """Candidates, each a list of loss terms. Left out: the built-in ones of the task. The default
    terms are always among them.
    """
    epochs: PositiveInt | None = None
    """Epochs of the race's last rung. Left out: a quarter of ``distill.epochs``, at least 2."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One recipe of so many is promoted to the next rung, with so many times the epochs."""


class AutoLosses(ConfigModel):
    """``losses: auto``, or ``losses: {auto: {epochs: 5}}``."""

    auto: AutoSettings = AutoSettings()
    """The race."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return {} if value in ("auto", {"auto": None}) else value


def _kind_of_losses(value: Any) -> str | None:
    if isinstance(value, AutoLosses) or value == "auto":
        return "<AutoLosses>"
    if isinstance(value, dict) and "auto" in value:
        return "<AutoLosses>"
    return "<LossTerm>" if isinstance(value, list | tuple) else None


Losses = Annotated[
    Annotated[Recipe, Tag("<LossTerm>")] | Annotated[AutoLosses, Tag("<AutoLosses>")],
    Discriminator(
        _kind_of_losses,
        custom_error_type="losses",
        custom_error_message="give a list of loss terms, or auto",
    ),
]


class SchemeConfig(ConfigModel):
    """Section ``distill.scheme``: who teaches whom; ``offline``, or ``{online: {peers: 2}}``."""

    name: str = "offline"
    """``offline``, ``online``, ``self``, ``assistant``, ``ensemble``, or ``package.module:name``.
    """
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the scheme."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return _one_name(value, "a scheme", "{online: {peers: 2}}")


class CacheConfig(ConfigModel):
    """Section ``distill.cache``: the teacher's outputs on disk, so that it is run once per view of
    a sample.
    """

    views: PositiveInt = 8
    """Number of different augmentations of each sample, used in turn."""
    top: PositiveInt = 10
    """Number of logits stored per output, with the logsumexp of the rest; all of them when there
    are no more classes.
    """
    folder: str | None = None
    """A folder shared between runs. Left out: the run's folder."""


WITHOUT_TEACHER = ("online", "self")
"""Schemes in which the pipeline's teacher does not teach."""


class DistillConfig(TrainConfig):
    """Section ``distill``: the student's training; all keys of a training, and these."""

    losses: Losses | None = None
    """Loss terms; or ``auto``: the best of several recipes, found by a race. Left out: a tenth
    against the labels and nine tenths against the teacher (soft labels at T = 4; for continuous
    outputs the task's distance).
    """
    scheme: SchemeConfig = SchemeConfig()
    """Who teaches whom."""
    cache: CacheConfig | None = CacheConfig()
    """``false``: the teacher is run for each batch. Losses that compare the teacher's layers
    always run it.
    """
    augment: tuple[str | dict[str, dict[str, Any]], ...] | None = None
    """The student's augmentation. Left out: that of ``data``, with which the teacher is trained."""
    epochs: PositiveInt = 20
    """Passes over the training split."""
    baseline: bool = True
    """Whether the same student is also trained without the teacher, from the same initial weights
    and over the same batches, so that the gain and the gap closed are measured.
    """
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training and validation labels that the student may use, with the teacher and
    alone; the teacher's own training uses all of them.
    """
    keep: Literal["student", "better"] = "student"
    """Which network is shipped: the distilled ``student``, or the ``better`` one of it and the
    student alone on validation data.
    """

    @property
    def auto(self) -> AutoSettings | None:
        """The race of ``losses: auto``; None where the losses are named."""
        return self.losses.auto if isinstance(self.losses, AutoLosses) else None

    @model_validator(mode="after")
    def _has_what_it_compares(self) -> DistillConfig:
        if self.keep == "better" and not self.baseline:
            raise ValueError(
                "keep: better compares with the student alone, which baseline: false does not "
                "train; set baseline: true, or keep: student"
            )
        if self.auto is None:
            return self
        if self.scheme.name in WITHOUT_TEACHER:
            raise ValueError(
                f"losses: auto races losses against the teacher, which scheme: {self.scheme.name} "
                "does not use; remove one of the two"
            )
        if self.auto.epochs is not None and self.auto.epochs > self.epochs:
            raise ValueError(
                f"losses.auto.epochs: {self.auto.epochs} is more than the training's own epochs, "
                f"{self.epochs}; give fewer, or leave it out for a quarter"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _no_cache(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("cache") is False:
            return {**value, "cache": None}
        return value
