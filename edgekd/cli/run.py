"""``edgekd run`` and the commands that stop after one of its stages."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from edgekd.api import open_job, run_folder
from edgekd.cli.stage_command import pipeline_options, run_pipeline_until
from edgekd.pipeline.runner import plan as plan_run
from edgekd.stages import STAGES


@click.command()
@pipeline_options
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
def run(
    pipeline: Path, overrides: tuple[str, ...], output: Path | None, quiet: bool, until: str | None
) -> None:
    """Run PIPELINE: from the teacher to the gated bundle.

    Stages that are up to date are kept. After a kill or an interruption the next run goes on.
    """
    run_pipeline_until(pipeline, until, overrides, output, quiet)


@click.command()
@pipeline_options
def plan(pipeline: Path, overrides: tuple[str, ...], output: Path | None, quiet: bool) -> None:
    """Show which stages of PIPELINE would run, and why; nothing is run."""
    job = open_job(pipeline, overrides)
    rows = plan_run(job, run_folder(job, output), STAGES)
    console = Console()
    for row in rows:
        if not quiet or row.action == "run":
            console.print(
                f"{row.stage:10} {row.action:7} {row.reason}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    console.print(f"{sum(row.action == 'run' for row in rows)} of {len(rows)} stages would run")


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
