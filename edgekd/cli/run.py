"""The commands that run a pipeline, completely or up to a stage, and its result as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from edgekd.api import execute, open_job, plan_students, run_folder
from edgekd.cli.advise import advice_summary
from edgekd.cli.options import goal_option, pipeline_options, requirement_options, target_option
from edgekd.config.loader import Override, apply_overrides
from edgekd.config.yaml_source import read_yaml
from edgekd.extension import searching
from edgekd.measurement import full_text, value_text
from edgekd.pipeline.runner import RunOutcome, join_workers
from edgekd.pipeline.runner import plan as plan_run
from edgekd.progress import Console
from edgekd.release.gate import passed, read_gate
from edgekd.release.report_tables import (
    ROLES,
    constant_caution,
    distillation_effect,
    headline,
    thread_caution,
)
from edgekd.release.result import ModelResult, Result, read_result
from edgekd.stages import STAGES, preflight


def run_pipeline_until(
    pipeline: Path,
    until: str | None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    quiet: bool = False,
) -> RunOutcome:
    """Run a pipeline up to a stage, with progress on the terminal; print the result.

    Raises:
        EdgekdError: as the stages raise; :class:`edgekd.errors.GateFailed` when the gate did
            not pass, after the result was printed.
    """
    with join_workers() as workers:
        if workers is not None and not workers.is_main:
            workers.serve(STAGES)
            return RunOutcome()
        job = open_job(pipeline, overrides)
        folder = run_folder(job, output)
        console = Console()
        outcome = execute(job, folder, until, None if quiet else console, workers)
        if not quiet and not outcome.ran and outcome.failure is None:
            console.print("Nothing to do: every stage is up to date.")
        if "benchmark" in outcome.artifacts:
            print_result(console, outcome)
        archive = f"bundle/{job.config.name}.tar.gz"
        for name, place in (("report", "report/report.html"), ("bundle", archive)):
            if name in outcome.artifacts:
                shown = f"{name + ':':8}{folder / place}"
                console.print(shown, markup=False, highlight=False, soft_wrap=True)
        if "benchmark" in outcome.artifacts:
            print_headline(console, outcome)
        if outcome.failure is not None:
            raise outcome.failure
        return outcome


_COMPARISONS = (
    "gap_closed", "drop", "relative_drop", "gain_over_constant", "speedup", "size_ratio",
)  # fmt: skip

NEXT = (
    "next: 'edgekd init mine.yaml' writes a pipeline to edit for your own data (data) and teacher "
    "(teacher); the bundle's README.md says how to run it on the device"
)

_STATUS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def print_result(console: Console, outcome: RunOutcome) -> None:
    """Print the models side by side, and the gate's verdicts when it was reached."""
    result = read_result(outcome.folder("benchmark") / "result.json")
    console.print(_models(result))
    for name, figure in result.comparison.items():
        if name in _COMPARISONS and figure.value is not None:
            text = f"  {name.replace('_', ' ')}: {full_text(figure)}"
            console.print(text, markup=False, highlight=False)
    gap = result.comparison.get("gap_closed")
    if gap is not None and gap.value is None:
        text = f"  gap closed: not defined: {gap.note}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for line in constant_caution(result) + thread_caution(result):
        console.print(f"  {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if "gate" not in outcome.artifacts:
        return
    verdicts = read_gate(outcome.folder("gate"))
    for verdict in verdicts:
        color = _STATUS[verdict.status]
        console.print(
            f"  [{color}]{verdict.status:12}[/] {verdict.rule}: ", end="", highlight=False
        )
        console.print(verdict.reason, markup=False, highlight=False, soft_wrap=True)
    verdict_text = "[bold green]passed" if passed(verdicts) else "[bold red]not passed"
    console.print(f"gate: {verdict_text}[/]", highlight=False)


def print_headline(console: Console, outcome: RunOutcome) -> None:
    """Print what was gained in one sentence, and after a gate that passed what to do next."""
    result = read_result(outcome.folder("benchmark") / "result.json")
    effect = distillation_effect(result)
    style = "bold red" if effect is not None and effect.outcome == "harmed" else "bold"
    console.print(headline(result), style=style, markup=False, highlight=False, soft_wrap=True)
    if "bundle" in outcome.artifacts and outcome.failure is None:
        console.print(NEXT, markup=False, highlight=False, soft_wrap=True)


def _models(result: Result) -> Table:
    """One column per model: three models fit on a terminal, six figures as columns do not."""
    shown = [(title, result.models[role]) for role, title in ROLES.items() if role in result.models]
    table = Table(title=Text(f"{result.name} on {result.profile} ({result.evidence})"))
    table.add_column("")
    for title, _ in shown:
        table.add_column(title, justify="right")
    rows: dict[str, Callable[[ModelResult], str]] = {
        result.metric: lambda model: full_text(model.metric),
        "parameters": lambda model: value_text(model.parameters),
        "size": lambda model: value_text(model.size_mb),
        "p50": lambda model: full_text(model.latency.get("p50_ms")),
        "p95": lambda model: full_text(model.latency.get("p95_ms")),
        "peak memory": lambda model: value_text(model.peak_memory_mb),
    }
    for name, text in rows.items():
        table.add_row(Text(name), *(Text(text(model)) for _, model in shown))
    return table


until_option = click.option("--until", metavar="STAGE", help="Stop after this stage.")


@click.command()
@pipeline_options
@requirement_options
@goal_option
@target_option
@until_option
def run(
    pipeline: Path, overrides: tuple[str, ...], output: Path | None, quiet: bool, until: str | None
) -> None:
    """Run PIPELINE: from the teacher to the gated bundle.

    Stages that are up to date are skipped. After a kill or an interruption the next run resumes.
    """
    run_pipeline_until(pipeline, until, overrides, output, quiet)


@click.command()
@pipeline_options
@requirement_options
@goal_option
@target_option
@until_option
def plan(
    pipeline: Path, overrides: tuple[str, ...], output: Path | None, quiet: bool, until: str | None
) -> None:
    """Show which stages of PIPELINE would run, and why; no stage is run.

    What a run refuses before its first stage is refused here too: names, arguments, the gate's
    rules. Your own modules are imported for that.

    Where the student is searched for, also its candidates with the memory and latency that are
    predicted, and how long the search may take; for that the data are prepared, and what was
    counted is stored. Exit code 2 when no candidate can hold all limits.
    """
    job = open_job(pipeline, overrides)
    folder, console = run_folder(job, output), Console()
    if not quiet:
        content = read_yaml(pipeline).content
        content = apply_overrides(content, [Override.parse(text) for text in overrides])
        for line in advice_summary(job, content, folder):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    rows = plan_run(job, folder, STAGES, until)
    for row in rows:
        if not quiet or row.action == "run":
            console.print(
                f"{row.stage:10} {row.action:7} {row.reason}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    count = sum(row.action == "run" for row in rows)
    console.print(f"{count} of {len(rows)} stages would run")
    if count:
        with searching(job.base):
            preflight(job, "gate" in [row.stage for row in rows])
    if job.config.student.search is not None and "student" in [row.stage for row in rows]:
        from edgekd.cli.students import print_search
        from edgekd.stages.survey import nothing_feasible

        record = plan_students(job, folder, None if quiet else console)
        print_search(console, record, folder / "cache")
        if (error := nothing_feasible(record)) is not None:
            raise error


def _until(stage: str, help_text: str) -> click.Command:
    @click.command(stage, help=help_text)
    @pipeline_options
    def command(
        pipeline: Path, overrides: tuple[str, ...], output: Path | None, quiet: bool
    ) -> None:
        run_pipeline_until(pipeline, stage, overrides, output, quiet)

    return command


distill = _until("distill", "Run PIPELINE up to the distilled student.")

export = _until("export", "Run PIPELINE up to the ONNX files, checked against PyTorch.")

report = _until("report", "Run PIPELINE up to its report.")

bundle = _until("bundle", "Run PIPELINE up to the bundle; withheld when the gate fails.")
