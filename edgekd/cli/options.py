"""Options of several commands: their types, and which apply to what is given."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekd.errors import InputError, printable
from edgerun.cli import MAX_THREADS

if TYPE_CHECKING:
    from edgekd.config.goal import Goal


def is_pipeline(file: str | Path) -> bool:
    """Whether a file is a pipeline's by its suffix, in any case."""
    return str(file).lower().endswith((".yaml", ".yml"))


THREADS = click.IntRange(1, MAX_THREADS)


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN, which is in every range, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


Command = TypeVar("Command", bound=Callable[..., Any])


def pipeline_options(command: Command) -> Command:
    """The argument and options of every command that takes a pipeline file."""
    for decorate in (
        click.option("-q", "--quiet", is_flag=True, help="Print only errors and the result."),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path, file_okay=True),
            help="The run folder.  [default: runs/<name>]",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a key for this run, e.g. --set distill.epochs=5.",
        ),
        click.argument("pipeline", type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command


_ABOVE_ZERO = FiniteRange(min=0, min_open=True)

_REQUIREMENTS = {
    "--memory-mb": ("gate.memory.peak_mb", _ABOVE_ZERO, "Peak memory above an empty process."),
    "--latency-ms": ("gate.latency.p95_ms", _ABOVE_ZERO, "95th percentile of one query."),
    "--size-mb": ("gate.size.max_mb", _ABOVE_ZERO, "The shipped file."),
    "--max-drop": ("gate.accuracy.max_drop", FiniteRange(min=0), "Loss against the teacher."),
}
"""Each option of :func:`requirement_options`: the key that it sets, its range, its help."""


def requirement_options(command: Command) -> Command:
    """Add the options that state a requirement; the command receives them among ``overrides``.

    Raises:
        InputError: the same key is set by ``--set``.
    """

    @functools.wraps(command)
    def with_requirements(*args: Any, overrides: tuple[str, ...] = (), **given: Any) -> Any:
        for option, (key, _, _) in _REQUIREMENTS.items():
            value = given.pop(option[2:].replace("-", "_"))
            if value is None:
                continue
            if clash := [text for text in overrides if text.partition("=")[0].strip() == key]:
                raise InputError(
                    f"{option} {value:g} sets {key}, which --set {clash[0]} sets too",
                    where=option,
                    remedy="leave one of them out",
                )
            overrides = (*overrides, f"{key}={value!r}")
        return command(*args, overrides=overrides, **given)

    decorated: Any = with_requirements
    for option, (key, kind, text) in reversed(_REQUIREMENTS.items()):
        decorated = click.option(option, type=kind, help=f"{text}  [{key}]")(decorated)
    result: Command = decorated
    return result


def target_option(command: Command) -> Command:
    """Add ``--target``; the command receives it among ``overrides``, after those of ``--set``."""

    @functools.wraps(command)
    def with_target(
        *args: Any, target: str | None, overrides: tuple[str, ...] = (), **given: Any
    ) -> Any:
        return command(*args, overrides=overrides + target_override(target), **given)

    text = "Where it is measured: local, ssh://user@host[:port], or a name (edgekd target list)."
    decorated: Any = with_target
    result: Command = click.option("--target", metavar="TARGET", help=text)(decorated)
    return result


def target_override(target: str | None) -> tuple[str, ...]:
    """The override of a pipeline's target by ``--target``."""
    # JSON is YAML, and quoted: a name may look like a number.
    return () if target is None else (f"target={json.dumps(target)}",)


def goal_words(command: Command) -> Command:
    """Add ``--goal``; the command receives its words."""
    return click.option(
        "--goal",
        metavar="WORDS",
        help="Requirements in plain words, English or Chinese: 'under 5 ms on a Raspberry Pi 5, "
        "lose at most one point'.",
    )(command)


def goal_option(command: Command) -> Command:
    """Add ``--goal``; the command receives its keys among ``overrides``, after they are shown."""

    @functools.wraps(command)
    def with_goal(
        *args: Any, pipeline: Path, goal: str | None, overrides: tuple[str, ...] = (), **given: Any
    ) -> Any:
        if goal is not None:
            overrides = goal_overrides(goal, pipeline, overrides)
        return command(*args, pipeline=pipeline, overrides=overrides, **given)

    decorated: Any = with_goal
    result: Command = goal_words(decorated)
    return result


def show_goal(goal: Goal, before: str = "") -> None:
    """Print what a goal was understood as, with a text before each line."""
    if os.environ.get("RANK", "0") != "0":
        return  # One of several processes that torchrun started prints.
    click.echo(f"{before}understood:")
    for line in goal.lines():
        click.echo(printable(f"{before}  {line}"))


def goal_overrides(text: str, pipeline: Path, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    """The overrides of ``--goal`` for a pipeline file, shown, behind those of ``--set``.

    Raises:
        InputError: the goal is not understood, needs what the file does not leave open, or sets
            what ``--set`` or an option sets too.
    """
    from edgekd.config.goal import parse_goal
    from edgekd.config.loader import Override, apply_overrides
    from edgekd.config.yaml_source import read_yaml

    goal = parse_goal(text)
    show_goal(goal)
    content = apply_overrides(read_yaml(pipeline).content, [Override.parse(o) for o in overrides])
    return join_overrides(goal.overrides(content), overrides)


def join_overrides(wanted: Sequence[str], overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides of a goal behind the others.

    Raises:
        InputError: both set a key.
    """
    given = {text.partition("=")[0].strip(): text for text in overrides}
    for text in wanted:
        key = text.partition("=")[0]
        if key in given and given[key] != text:
            raise InputError(
                f"the goal sets {key}, which is set by {given[key]!r} too",
                where="--goal",
                remedy="leave one of them out",
            )
    return (*overrides, *wanted)


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
