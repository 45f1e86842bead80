"""Base class of all sections of pipeline and profile files; their old spellings, read until 0.3."""

from __future__ import annotations

import sys
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgerun.cli import MAX_THREADS

LOSSES: Mapping[str, str] = {
    "channel_wise": "cwd",
    "hard_targets": "target_regression",
    "regression": "output_regression",
    "similarity": "sp",
    "standardized": "logit_standardization",
    "teacher_labels": "hard_distillation",
    "virtual_teacher": "tf_kd",
}
"""Old name of a loss → its name."""

_noticed: set[tuple[str, str]] = set()


def current_loss(term: Any) -> Any:
    """A loss term, as read from YAML, under the current name of its loss."""
    old = term.get("name") if isinstance(term, dict) else None
    if not isinstance(old, str) or old not in LOSSES:
        return term
    _notice("the loss", old, LOSSES[old])
    return {**term, "name": LOSSES[old]}


def current_keys(section: Mapping[Any, Any], renamed: Mapping[str, str]) -> dict[Any, Any]:
    """A section of a pipeline file with its keys in their current spelling.

    Args:
        section: as read from YAML.
        renamed: old key → new key.

    Raises:
        ValueError: a key is given in both spellings.
    """
    for old, new in renamed.items():
        if old in section:
            if new in section:
                raise ValueError(f"{old!r} is the old spelling of {new!r}: remove {old!r}")
            _notice("the key", old, new)
    return {renamed.get(key, key): value for key, value in section.items()}


def _notice(kind: str, old: str, new: str) -> None:
    if (old, new) not in _noticed:
        _noticed.add((old, new))
        print(
            f"note: {kind} {old!r} is now {new!r}; version 0.3 no longer reads {old!r}",
            file=sys.stderr,
        )


PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Threads = Annotated[int, Field(ge=1, le=MAX_THREADS)]

PositiveInt = Annotated[int, Field(gt=0)]


class ConfigModel(BaseModel):
    """Base of every section: unknown keys are errors, values are not changed after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old key → new key; the old one is read until version 0.3, with a notice."""

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, value: Any) -> Any:
        """The section with its keys in their current spelling.

        A boolean where a number belongs becomes the text that it is written as, which no number
        is: pydantic would read true as 1.
        """
        if not isinstance(value, dict):
            return value
        section = current_keys(value, cls.renamed)
        for key, field in cls.model_fields.items():
            if isinstance(section.get(key), bool):
                types = _types_in(field.annotation)
                if types & {int, float} and bool not in types:
                    section[key] = str(section[key]).lower()
        return section


def _types_in(annotation: Any) -> set[Any]:
    inner = typing.get_args(annotation)
    return {found for part in inner for found in _types_in(part)} if inner else {annotation}
