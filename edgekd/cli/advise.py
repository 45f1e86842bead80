"""``edgekd advise``: a choice for each part of a pipeline, with reasons, as YAML that runs."""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from edgekd.api import open_job, run_folder
from edgekd.cli.options import goal_words, join_overrides, requirement_options, show_goal
from edgekd.config.goal import OBJECTIVES, Goal, Wish, parse_goal
from edgekd.config.loader import Override, apply_overrides
from edgekd.config.yaml_source import read_yaml
from edgekd.errors import InputError, printable
from edgekd.files import write_errors, write_whole
from edgekd.pipeline.runner import plan
from edgekd.pipeline.stage import Job
from edgekd.stages import STAGES, preflight

if TYPE_CHECKING:
    from edgekd.students.advice_facts import Advice

_SHOWN = ("student", "distill.losses", "distill.scheme", "quantize")
"""What the short form is about."""

_PATHS = (
    "data.path",
    "teacher.checkpoint",
    "teacher.onnx",
    "student.checkpoint",
    "distill.cache.folder",
    "profile",
)
"""Keys whose value may be a path relative to the file."""


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path))
@goal_words
@requirement_options
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key, e.g. --set distill.epochs=5.",
)
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="The run folder with what was measured.  [default: runs/<name>]",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the YAML to this file."
)
@click.option("--force", is_flag=True, help="Write over an existing file.")
def advise(
    pipeline: Path,
    goal: str | None,
    overrides: tuple[str, ...],
    folder: Path | None,
    output: Path | None,
    force: bool,
) -> None:
    """Advise a student, losses, scheme, precision, engine and budgets for PIPELINE, as YAML.

    Each line has its reason and its evidence: measured in the run folder or in the documentation,
    or published. What the file sets is changed only where something speaks against it, and then the
    file's value is in the comment.
    """
    if output is not None and output.exists() and not force:
        raise InputError(
            "the file exists already", where=str(output), remedy="give another path, or --force"
        )
    understood = parse_goal(goal) if goal is not None else None
    if understood is not None:
        show_goal(understood, "# ")
    settings = click.get_current_context().params["overrides"]
    requirements = overrides[len(settings) :]
    content, advice, job = _advice(pipeline, understood, settings, requirements, folder)
    text = _yaml(content, advice)
    _check(text, job)
    if output is None:
        click.echo(printable(text), nl=False)
        return
    moved = _moved(content, job.base, output)
    text = _yaml(moved, advice)
    with write_errors(output, "the pipeline"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text, "the pipeline")
    for line in _short_lines(advice):
        click.echo(printable(line))
    click.echo(printable(f"wrote {output}; next: edgekd plan {output}"))


def _advice(
    pipeline: Path,
    goal: Goal | None,
    settings: Sequence[str],
    requirements: Sequence[str],
    folder: Path | None,
) -> tuple[dict[str, Any], tuple[Advice, ...], Job]:
    """The advised content, the advice and the job it is for."""
    from edgekd.stages.advice import read_facts
    from edgekd.students.advice import advise as rules
    from edgekd.students.advice import advised_content

    source = read_yaml(pipeline)
    before = apply_overrides(source.content, [Override.parse(o) for o in settings])
    # "As small as possible" is a wish of the search that is advised, which the file need not have.
    wishes: tuple[Wish, ...] = goal.wishes if goal is not None else ()
    objectives = next((w.value for w in wishes if w.key == OBJECTIVES), None)
    fixed = Goal(tuple(w for w in wishes if w.key != OBJECTIVES))
    wanted = join_overrides(fixed.overrides(before), (*settings, *requirements))[len(settings) :]
    content = apply_overrides(before, [Override.parse(o) for o in wanted])
    as_it_is = open_job(pipeline, settings)
    job = open_job(pipeline, [*settings, *wanted])
    place = run_folder(as_it_is, folder)
    rows = plan(as_it_is, place, STAGES) if place.is_dir() else []
    keys = [o.partition("=")[0] for o in wanted]
    facts = read_facts(job, content, before, keys, rows, objectives)
    advice = rules(facts)
    return advised_content(content, advice), advice, job


def advice_summary(job: Job, content: Mapping[str, Any], folder: Path) -> list[str]:
    """The advice for a job in a few lines, for the plan: what is advised other than it is.

    Args:
        job: as it would be run.
        content: the same as it is written.
        folder: its run folder.
    """
    from edgekd.stages.advice import read_facts
    from edgekd.students.advice import advise as rules
    from edgekd.students.advice_facts import at

    rows = plan(job, folder, STAGES) if folder.is_dir() else []
    advice = rules(read_facts(job, content, content, (), rows))
    written = {key: at(content, key) for key in _SHOWN} | {
        "distill.scheme": at(content, "distill.scheme") or "offline"
    }
    others = [one for one in advice if one.key in _SHOWN and one.value != written[one.key]]
    lines = _short_lines(others)
    alike = [key for key in _SHOWN if key not in {one.key for one in others}]
    if alike:
        lines.append(f"advise {', '.join(alike)}: as the file has it")
    return [*lines, "'edgekd advise' gives the reasons, and YAML"]


def _short_lines(advice: Sequence[Advice]) -> list[str]:
    from edgekd.students.advice_facts import short

    return [
        f"advise {one.key}: {short(one.value, 60)}: {one.reason.split(';')[0]}"
        for one in advice
        if one.key in _SHOWN and one.value is not None
    ]


# YAML -------------------------------------------------------------------------------------------


def _yaml(content: Mapping[str, Any], advice: Sequence[Advice]) -> str:
    """The content with the advice's comments above its keys."""
    comments = {one.key: one.comment for one in advice}
    head = "# Written by edgekd advise. In brackets: where a reason is from.\n"
    return head + "\n".join(_emitted(content, comments, "", "")) + "\n"


def _emitted(
    content: Mapping[str, Any], comments: Mapping[str, str], prefix: str, indent: str
) -> Iterator[str]:
    for key, value in content.items():
        path = f"{prefix}{key}"
        if path in comments:
            yield from textwrap.wrap(
                comments[path],
                100,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        if isinstance(value, Mapping) and any(c.startswith(f"{path}.") for c in comments):
            yield f"{indent}{key}:"
            yield from _emitted(value, comments, f"{path}.", f"{indent}  ")
            continue
        text = yaml.safe_dump(
            {key: value},
            sort_keys=False,
            allow_unicode=True,
            width=100,
            default_flow_style=None if isinstance(value, Mapping | list) else False,
        )
        yield textwrap.indent(text.rstrip("\n"), indent)


def _check(text: str, job: Job) -> None:
    """Load the YAML as a user would, and resolve every name in it.

    Raises:
        InputError: it could not be run.
    """
    from edgekd.config.pipeline import load_pipeline
    from edgekd.extension import searching

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "advised.yaml"
        path.write_text(text, encoding="utf-8")
        config = load_pipeline(path)
    with searching(job.base):
        preflight(Job(config, job.base, job.profile))


def _moved(content: Mapping[str, Any], base: Path, output: Path) -> dict[str, Any]:
    """The content with its relative paths resolving from the folder of ``output``.

    Raises:
        InputError: it names modules that lie next to the pipeline file, and ``output`` does not.
    """
    target = Path(os.path.realpath(output)).parent
    if target == base:
        return dict(content)
    for reference in _references(content):
        module = reference.partition(":")[0].partition(".")[0]
        if (base / f"{module}.py").is_file() or (base / module).is_dir():
            raise InputError(
                f"the pipeline uses {reference!r} from its own folder",
                where=str(output),
                remedy=f"write the file there: -o {base / output.name}",
            )
    result = apply_overrides(dict(content), [])
    for key in _PATHS:
        *parents, last = key.split(".")
        node: Any = result
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        value = node.get(last) if isinstance(node, dict) else None
        if isinstance(value, str) and (key != "profile" or re.search(r"[/\\]|\.ya?ml$", value)):
            node[last] = _relative(value, base, target)
    inner = (result.get("distill", {}).get("scheme"), result.get("student", {}).get("search"))
    for node in _mappings(list(inner)):
        for last in ("checkpoint", "onnx"):
            if isinstance(node.get(last), str):
                node[last] = _relative(node[last], base, target)
    return result


def _relative(value: str, base: Path, target: Path) -> str:
    path = Path(value).expanduser()
    return value if path.is_absolute() else Path(os.path.relpath(base / path, target)).as_posix()


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _mappings(part)


def _references(value: Any) -> Iterator[str]:
    """Every text, key or value, that looks like ``package.module:name``."""
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", value):
            yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _references(key)
            yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)
