"""How networks are trained and distilled: ``teacher.train`` and the section ``distill``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgekd.config.section import Count, Positive, Section


class Schedule(Section):
    """A number that goes from ``start`` to ``end`` and stays there.

    ``over`` is the part of the training that it takes: ``{start: 0, end: 8, over: 0.1}`` is a
    warm-up over the first tenth.
    """

    start: float
    end: float
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, part: float) -> float:
        """Its value when ``part`` of the training is done, from 0 to 1."""
        share = min(1.0, part / self.over)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


class TrainConfig(Section):
    """How a network is trained; the same keys for teacher, student and distillation.

    ``warm_up`` is the part of the steps over which the learning rate rises from almost 0 (for
    ``constant`` and ``cosine``; ``one-cycle`` has its own). ``ema`` is the decay per step of an
    average of the weights, which is then what is validated and kept. ``accumulate`` batches make
    one step. ``patience`` stops when validation was not better for that many epochs.
    """

    epochs: Count = 10
    batch_size: Count = 128
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Positive = 2e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["constant", "cosine", "one-cycle"] = "one-cycle"
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Positive | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    accumulate: Count = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    patience: Count | None = None
    channels_last: bool = True
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


def _one_name(value: Any, kind: str, example: str, beside: tuple[str, ...] = ()) -> Any:
    """``name`` or ``{name: {arguments}, …}`` as written in YAML, as a mapping with the two keys."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict) or not value or "name" in value:
        return value
    names = [key for key in value if key not in beside]
    if len(names) != 1:
        found = ", ".join(map(str, names)) or "none"
        raise ValueError(f"{kind} names one thing, e.g. {example}; here: {found}")
    rest = {key: value[key] for key in beside if key in value}
    return {"name": names[0], "args": value[names[0]] or {}, **rest}


class LossTerm(Section):
    """One term of the objective: ``{soft_labels: {temperature: 4}, weight: 0.9}``.

    The arguments ``student`` and ``teacher`` name the layers it compares (a list of them for
    several pairs); without them it compares the primary outputs. The weight, and any number
    among the arguments, may be a :class:`Schedule`.
    """

    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    weight: Annotated[float, Field(ge=0)] | Schedule = 1.0

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
        return _one_name(value, "a loss term", example, ("weight",))


class SchemeConfig(Section):
    """Who teaches whom: ``offline``, or ``{online: {peers: 2}}``."""

    name: str = "offline"
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return _one_name(value, "a scheme", "{online: {peers: 2}}")


class CacheConfig(Section):
    """The teacher's answers on disk, so that it answers each view of a sample once.

    ``views`` different augmentations of each sample are gone through in turn. ``top`` logits of
    each answer are kept; all of them when there are no more classes. ``folder`` is shared
    between runs; without it the answers lie in the run's folder.
    """

    views: Count = 8
    top: Count = 10
    folder: str | None = None


class DistillConfig(TrainConfig):
    """The student's training: the terms of the objective beside the training keys.

    ``baseline: true`` also trains the same student, from the same initial weights and over the
    same batches, without the teacher, so that the gap closed is measured. ``labelled`` below 1
    leaves the student, with a teacher and alone, that share of the training and validation
    labels; the teacher's own training has all of them.
    """

    losses: tuple[LossTerm, ...] | None = Field(default=None, min_length=1)
    """None: those of :meth:`PipelineConfig.loss_terms`."""
    scheme: SchemeConfig = SchemeConfig()
    cache: CacheConfig | None = CacheConfig()
    """None (in YAML also ``false``): the teacher answers each batch anew."""
    augment: tuple[str | dict[str, dict[str, Any]], ...] | None = None
    """The student's augmentation; None: that of ``data``, which the teacher is trained with."""
    epochs: Count = 20
    baseline: bool = True
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _no_cache(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("cache") is False:
            return {**value, "cache": None}
        return value
