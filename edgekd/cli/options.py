"""Options of several commands: their types, and which apply to what is given."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import click

from edgekd.errors import InputError
from edgerun.cli import MAX_THREADS

PIPELINE_SUFFIXES = (".yaml", ".yml")

THREADS = click.IntRange(1, MAX_THREADS)

_SHAPE = re.compile(r"(?P<name>.+)=(?P<sizes>[1-9]\d{0,17}(?:x[1-9]\d{0,17})*|)")


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN, which is in every range, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def parse_shape(option: str) -> tuple[str, tuple[int, ...]]:
    """``x=1x3`` as the name and its sizes; ``x=`` is a scalar.

    Raises:
        InputError: it is not a shape.
    """
    match = _SHAPE.fullmatch(option)
    if match is None:
        shown = option if len(option) <= 80 else f"{option[:80]}…"
        raise InputError(
            f"{shown!r} is not a shape",
            where="--shape",
            remedy="write NAME=1x3x224x224, with sizes of at least 1",
        )
    sizes = match["sizes"]
    return match["name"], tuple(map(int, sizes.split("x"))) if sizes else ()


def typed_options() -> frozenset[str]:
    """Names of the current command's parameters that were typed."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return frozenset(
        parameter.name
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) is typed
    )


def refuse_options(names: Collection[str], meant_for: str, remedy: str = "leave it out") -> None:
    """Refuse options that have no meaning for what was given.

    Args:
        names: of the parameters.
        meant_for: what they apply to and what not, such as "an ONNX model, not for a pipeline".
        remedy: what to do instead.

    Raises:
        InputError: there is one.
    """
    if not names:
        return
    context = click.get_current_context()
    options = [parameter.opts[0] for parameter in context.command.params if parameter.name in names]
    raise InputError(
        f"{', '.join(options)} is for {meant_for}",
        where=f"edgekd {context.info_name}",
        remedy=remedy,
    )


def refuse_options_of_a_model(allowed: Collection[str]) -> None:
    """Refuse every option that was typed with a pipeline file, except those in ``allowed``.

    Raises:
        InputError: there is one.
    """
    refuse_options(
        typed_options() - frozenset(allowed),
        "an ONNX model, not for a pipeline",
        "leave it out: a pipeline has its settings in its file",
    )
