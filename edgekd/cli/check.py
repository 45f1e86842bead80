"""``edgekd check``: whether a model will run on a device, and what prevents it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekd.cli.benchmark import write_record
from edgekd.cli.options import is_pipeline
from edgekd.errors import GateFailed, InputError, edgerun_errors

if TYPE_CHECKING:
    from edgekd.engines.check import CheckReport
    from edgekd.progress import Console

FILE = click.Path(path_type=Path)
_ENGINES = click.Choice(["tensorrt-rtx", "tensorrt", "onnxruntime"])
_MARKS = {
    "ok": "[green]ok[/green]",
    "fails": "[red]fails[/red]",
    "inconclusive": "[yellow]inconclusive[/yellow]",
    "note": "–",
}


@click.command()
@click.argument("model", type=FILE, metavar="MODEL.onnx")
@click.option("--profile", metavar="NAME", help="The device: its engine, providers and budgets.")
@click.option(
    "--engine", "engines", multiple=True, type=_ENGINES, help="[default: the profile's, or ONNX "
    "Runtime; may be given several times]",
)  # fmt: skip
@click.option("--providers", metavar="A,B", help="[default: the profile's, or the CPU]")
@click.option("--batch", type=click.IntRange(min=1), help="For the memory.  [default: 1]")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x3x224x224")
@click.option("--json", "out", type=FILE, metavar="OUT", help="Write everything found here.")
def check(
    model: Path,
    profile: str | None,
    engines: tuple[str, ...],
    providers: str | None,
    batch: int | None,
    shapes: tuple[str, ...],
    out: Path | None,
) -> None:
    """Check whether MODEL.onnx will run, and show what to do where it will not.

    TensorRT's own parser reads the model (TensorRT for RTX works without a GPU), and ONNX Runtime
    shows which provider runs which node; the memory is estimated from the graph.

    Exit codes: 0 every check passed, 1 a check failed or is inconclusive, 2 the input is wrong.
    """
    from edgekd.config.profile import load_profile
    from edgekd.crashes import note_model
    from edgekd.engines.check import check_model
    from edgekd.files import check_output
    from edgekd.onnx.file import files_of_onnx
    from edgekd.progress import Console
    from edgekd.targets import LocalTarget, open_target
    from edgerun.model import parse_shapes

    if is_pipeline(model):
        raise InputError(
            "check takes an ONNX file, and this is a pipeline",
            where=str(model),
            remedy="give one that it exported (artifacts/export in its run folder), or build it: "
            f"edgekd build {model}",
        )
    with edgerun_errors():
        given_shapes = parse_shapes(shapes)
    note_model(model)
    if out is not None:
        read = [*files_of_onnx(model), *([Path(profile)] if profile else [])]
        check_output(out, "--json", inputs=read, stream=True)
    target = open_target(LocalTarget.name)
    with Console(stderr=True).status("checking with the runtimes"):
        report = check_model(
            model,
            target.parse,
            lambda path: target.probe(path, threads=1, run=False),
            engines=engines,
            profile=load_profile(profile) if profile else None,
            providers=[name.strip() for name in (providers or "").split(",") if name.strip()],
            shapes=given_shapes,
            batch=batch,
        )
    if out is not None:
        write_record(out, report.to_json())
    _print(Console(), report)
    if not report.passed:
        click.get_current_context().exit(GateFailed.exit_code)


def _print(console: Console, report: CheckReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in report.findings:
        # Names from the model may hold brackets, which rich reads as markup.
        table.add_row(_MARKS[finding.status], escape(finding.subject), escape(finding.detail))
    console.print(table)
    to_do = [finding for finding in report.findings if finding.remedy]
    if to_do:
        console.print("\n[bold]To do[/bold]")
    for finding in to_do:
        line = f"  {finding.subject}: {finding.remedy}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    checked = " and ".join(report.engines) + (f" on {report.profile}" if report.profile else "")
    verdict = (
        "[green]all checks passed[/green]" if report.passed else "[red]not all checks passed[/red]"
    )
    unbuilt = report.passed and any(name.startswith("tensorrt") for name in report.engines)
    so_far = ", as far as can be determined without a build" if unbuilt else ""
    console.print(f"\n{verdict} for {checked}{so_far}", highlight=False)
