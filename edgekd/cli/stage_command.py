"""What the commands that run a pipeline, whole or up to a stage, have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from edgekd.api import execute, open_job, run_folder
from edgekd.cli.result_table import print_headline, print_result
from edgekd.pipeline.runner import RunOutcome
from edgekd.pipeline.team import joined
from edgekd.stages import STAGES

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


def run_pipeline_until(
    pipeline: Path,
    until: str | None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    quiet: bool = False,
) -> RunOutcome:
    """Run a pipeline up to a stage, with progress on the terminal; print what came out.

    Raises:
        EdgekdError: as the stages raise; :class:`edgekd.errors.GateFailed` when the gate did
            not pass, after the result was printed.
    """
    with joined() as team:
        if team is not None and not team.leads:
            team.follow(STAGES)
            return RunOutcome()
        job = open_job(pipeline, overrides)
        folder = run_folder(job, output)
        console = Console()
        outcome = execute(job, folder, until, None if quiet else console, team)
        if not quiet and not outcome.ran and outcome.failure is None:
            console.print("Nothing to do: every stage is up to date.")
        if "benchmark" in outcome.artifacts:
            print_result(console, outcome)
        archive = f"bundle/{job.config.name}.tar.gz"
        for name, place in (("report", "report/report.html"), ("bundle", archive)):
            if name in outcome.artifacts:
                console.print(f"{name + ':':8}{folder / place}", highlight=False, soft_wrap=True)
        if "benchmark" in outcome.artifacts:
            print_headline(console, outcome)
        if outcome.failure is not None:
            raise outcome.failure
        return outcome
