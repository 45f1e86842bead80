"""``edgekd students``: the candidates of a search, measured; and as ``edgekd plan`` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from edgekd.api import measure_students, open_job, run_folder
from edgekd.cli.options import goal_option, pipeline_options, requirement_options
from edgekd.errors import InputError
from edgekd.measurement import number
from edgekd.pipeline.stage import Job
from edgekd.progress import Console
from edgekd.release.student_search import (
    CandidateRow,
    candidate_table,
    latency_percentile,
    predictions_text,
)


@click.command()
@pipeline_options
@requirement_options
@goal_option
def students(pipeline: Path, overrides: tuple[str, ...], output: Path | None, quiet: bool) -> None:
    """Propose and measure the candidates for PIPELINE's student, without training any.

    Each is exported, quantized if the pipeline quantizes, built and timed on the target. Where the
    teacher is not trained yet, its network is measured with fresh weights. Exit code 2 when no
    candidate holds all limits.
    """
    from edgekd.stages.survey import nothing_feasible

    job = open_job(pipeline, overrides)
    check_searched(job)
    folder, console = run_folder(job, output), Console()
    record = measure_students(job, folder, None if quiet else console)
    print_search(console, record, folder / "cache")
    if (error := nothing_feasible(record)) is not None:
        raise error


def check_searched(job: Job) -> None:
    """Refuse a pipeline whose student is given.

    Raises:
        InputError: it has no ``student.search``.
    """
    if job.config.student.search is None:
        raise InputError(
            f"the student is given: {job.config.student.model}; there is nothing to search",
            where="student",
            remedy="write 'student: {search: {}}' to have it chosen",
        )


def print_search(console: Console, record: Mapping[str, Any], cache: Path) -> None:
    """Print the feasible region, the candidates, and what a search will take or has found.

    Args:
        console: where.
        record: the content of a ``search.json``.
        cache: the run's cache, which knows how long earlier work took.
    """
    from edgekd.stages.survey import expected_time

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    limits = [
        f"{key} {number(entry['limit'])} ({entry['origin']})"
        for key, entry in record["limits"].items()
    ]
    if limits:
        line(f"limits, {100 * record['margin']:.0f} % to spare: {', '.join(limits)}")
    else:
        line("limits: none; every candidate that runs is feasible")
    console.print(_table(record))
    if text := predictions_text(record["cost_model"] or {}):
        line(text)
    if record["winner"] is not None:
        line(record["why"])
        if record["assistant"]:
            line(record["assistant"]["text"])
        return
    counts = {
        status: sum(entry["status"] == status for entry in record["candidates"])
        for status in ("proposed", "feasible")
    }
    if counts["proposed"]:
        line(f"{counts['proposed']} of {len(record['candidates'])} candidates may hold all limits")
    elif counts["feasible"]:
        line(f"{counts['feasible']} of {len(record['candidates'])} candidates hold all limits")
    planned = record.get("planned")
    if planned:
        time = expected_time(record, cache)
        if counts["proposed"]:
            line(f"measuring {planned['arms']} at most: {_duration(time.measuring)}")
        rungs = ", ".join(map(str, planned["rungs"]))
        line(
            f"race of {planned['arms']} candidates at most for {rungs} epochs, "
            f"{planned['epochs']} in total: {_duration(time.racing)}"
        )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "time unknown, as nothing like it was run here yet"
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _table(record: Mapping[str, Any]) -> Table:
    percentile = latency_percentile(record["limits"])
    table = Table(caption="≈ predicted", caption_justify="left")
    table.add_column("candidate", overflow="fold")
    for heading in ("parameters", f"{percentile} (ms)", "memory (MB)", "size (MB)"):
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold")
    entries = {entry["name"]: entry for entry in record["candidates"]}
    for row in candidate_table(record):
        latency = _figure(entries[row.name], "latency_ms", percentile)
        memory = _figure(entries[row.name], "memory_mb")
        size = row.size.removesuffix(" MB")
        cells = (row.name, row.parameters, latency, memory, size, _found(row))
        table.add_row(*map(Text, cells))
    return table


def _figure(entry: Mapping[str, Any], key: str, part: str | None = None) -> str:
    """A measured figure, or else a predicted one marked so; its range on a second line."""
    for kind, mark in (("measured", ""), ("predicted", "≈ ")):
        found = (entry.get(kind) or {}).get(key)
        found = found[part] if found and part else found
        if found:
            value, low, high = (number(found[each], 3) for each in ("value", "low", "high"))
            return f"{mark}{value}" + (f"\n{low} to {high}" if low != high else "")
    return "–"


def _found(row: CandidateRow) -> str:
    return f"{row.status}: {row.reason}" if row.reason else row.status
