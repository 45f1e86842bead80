"""``edgekd gate``: a result against its budgets, alone or as a stage of a pipeline."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from edgekd.cli.options import is_pipeline
from edgekd.config.budgets import Budgets, GateConfig, load_budgets
from edgekd.config.profile import Profile, load_profile
from edgekd.errors import GateFailed, InputError, printable
from edgekd.files import check_output, write_errors
from edgekd.measurement import full_text
from edgekd.progress import Console
from edgekd.release.build_result import evidence_of_bench, read_bench, result_of_bench, with_bench
from edgekd.release.compare import find_result
from edgekd.release.gate import (
    Verdict,
    evaluate,
    passed,
    read_gate,
    summary_line,
    write_gate_json,
    write_junit,
)
from edgekd.release.result import Result, read_result

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


@click.command()
@click.argument(
    "result", type=click.Path(path_type=Path), metavar="RESULT.json|BENCH.json|PIPELINE.yaml"
)
@click.option(
    "--budget", type=click.Path(path_type=Path), help="YAML with the keys of a pipeline's gate."
)
@click.option("--profile", help="Also check the limits of this profile (a name or a YAML file).")
@click.option(
    "--device",
    type=click.Path(path_type=Path),
    metavar="BENCH.json",
    help="What edgerun bench measured on the device: its latency and memory count.",
)
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML here.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write JSON here.")
def gate(
    result: Path,
    budget: Path | None,
    profile: str | None,
    device: Path | None,
    junit: Path | None,
    json_path: Path | None,
) -> None:
    """Check the figures of RESULT.json against budgets; exit code 1 when they are not met.

    The budget file has the keys of a pipeline's gate section, or is a complete pipeline. Given a
    pipeline instead of a result, it is run up to its gate. BENCH.json is what 'edgerun bench
    --json' wrote on the device: alone it has latency, memory and size; with --device it adds
    these to the result of the workstation, which has the accuracy.
    """
    if is_pipeline(result) and budget is None:
        if profile or junit or json_path or device:
            raise InputError(
                "--profile, --device, --junit and --json go with a result file",
                where=str(result),
                remedy="a pipeline names its profile, and its gate stage writes both files",
            )
        from edgekd.cli.run import run_pipeline_until

        # The run prints its result and the verdicts itself.
        verdicts = read_gate(run_pipeline_until(result, "gate").folder("gate"))
    else:
        read = [result, *(Path(given) for given in (budget, profile, device) if given)]
        for option, path, other in (("--json", json_path, junit), ("--junit", junit, json_path)):
            if path is not None:
                others = [other] if other is not None else []
                check_output(path, option, inputs=[*read, *others], stream=True)
        section = GateConfig() if budget is None else load_budgets(budget)
        limits = load_profile(profile) if profile else None
        measured = _measured(result, device, limits, section.accuracy.max is not None)
        verdicts = evaluate(measured, Budgets.resolve(section, limits))
        for path, write in ((json_path, write_gate_json), (junit, write_junit)):
            if path is not None:
                with write_errors(path, "the verdicts", error=InputError):
                    write(path, measured.name, verdicts)
        console = Console()
        console.print(verdict_table(verdicts))
        console.print(summary_line(verdicts), highlight=False, markup=False)
    if not passed(verdicts):
        raise GateFailed(
            "the gate did not pass",
            where=str(result),
            remedy="change the student or the budget; an inconclusive rule needs more samples or "
            "evidence",
        )


def _measured(
    file: Path, device: Path | None, limits: Profile | None, lower_is_better: bool
) -> Result:
    """The result in a file, or the device's figures alone, or both together.

    Raises:
        InputError: a file is damaged, or is not what it is given as.
    """
    alone = read_bench(file)
    if alone is not None and device is not None:
        raise InputError(
            "two files of edgerun bench are given, and no result",
            where=str(file),
            remedy="give the pipeline's result.json first",
        )
    if alone is not None:
        evidence, why = evidence_of_bench(alone, limits, None)
        result = result_of_bench(alone, str(file), evidence, lower_is_better)
    else:
        result, why = read_result(find_result(file)), ""
    if device is not None:
        bench = read_bench(device)
        if bench is None:
            raise InputError(
                "this is not what edgerun bench wrote",
                where=str(device),
                remedy="on the device: python -m edgerun bench model.onnx --json bench.json",
            )
        expected = limits or _profile_of(result.profile)
        evidence, why = evidence_of_bench(bench, expected, result.environment)
        result = with_bench(result, bench, str(device), evidence)
    if why:
        click.echo(
            printable(f"{device or file}: {why}; its figures are measured-on-host"), err=True
        )
    return result


def _profile_of(name: str) -> Profile | None:
    """The built-in profile that a result names; None for a profile of the user's own file."""
    try:
        return load_profile(name)
    except InputError:
        return None


def verdict_table(verdicts: list[Verdict]) -> Table:
    """The verdicts as a table for the terminal."""
    table = Table(box=None, pad_edge=False)
    for heading in ("rule", "verdict", "figure", "budget", "why"):
        table.add_column(heading, no_wrap=heading in ("rule", "verdict"))
    for verdict in verdicts:
        colour = _COLOURS[verdict.status]
        origin = "" if verdict.origin == "gate" else f" ({verdict.origin})"
        table.add_row(
            verdict.rule,
            f"[{colour}]{verdict.status}[/{colour}]",
            escape(full_text(verdict.figure)),
            escape(verdict.budget_text + origin),
            "" if verdict.status == "pass" else escape(verdict.reason),
        )
    return table
