"""Several results side by side, and the mean over the seeds of one pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekd.errors import InputError
from edgekd.measurement import EVIDENCE_STRENGTH, Evidence, Measurement
from edgekd.release.result import Result, read_result
from edgekd.release.statistics import mean

SCHEMA = "edgekd.compare/1"
_FIXED = ("size", "parameters")
"""Figures of the network, which no seed changes."""
_RESULT_PLACES = ("result.json", "benchmark/result.json")


@dataclass(frozen=True)
class FigureRow:
    """One figure of every result, in the order of the results; None where it is absent."""

    label: str
    figures: tuple[Measurement | None, ...]


@dataclass(frozen=True)
class SeedMeans:
    """The mean of each figure over the seeds of one pipeline, with its t interval.

    It includes what one run's interval over test samples cannot: the variation between trainings.
    """

    name: str
    seeds: tuple[int, ...]
    rows: tuple[FigureRow, ...]


@dataclass(frozen=True)
class ResultComparison:
    """Results side by side: ``labels`` are their columns."""

    labels: tuple[str, ...]
    rows: tuple[FigureRow, ...]
    seed_means: tuple[SeedMeans, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return {
            "schema": SCHEMA,
            "results": list(self.labels),
            "figures": {
                row.label: [figure.to_json() if figure else None for figure in row.figures]
                for row in self.rows
            },
            "seed_means": [
                {
                    "name": means.name,
                    "seeds": list(means.seeds),
                    "figures": {
                        row.label: figure.to_json()
                        for row in means.rows
                        if (figure := row.figures[0]) is not None
                    },
                }
                for means in self.seed_means
            ],
            "notes": list(self.notes),
        }


def find_result(path: Path) -> Path:
    """The result file of a path: the path itself, or the result in a run folder.

    Raises:
        InputError: the folder has none.
    """
    if not path.is_dir():
        return path
    for place in _RESULT_PLACES:
        if (path / place).is_file():
            return path / place
    raise InputError(
        "this folder has no result",
        where=str(path),
        remedy="give a result.json, or the folder of a run that reached its benchmark stage",
    )


def compare_files(paths: Sequence[Path]) -> ResultComparison:
    """Read result files or run folders and compare them.

    Raises:
        InputError: a path has no complete result, or no path is given.
    """
    if not paths:
        raise InputError("there is nothing to compare", remedy="give result files or run folders")
    labels, results = [], []
    for path in paths:
        file = find_result(path)
        results.append(read_result(file))
        labels.append(str(path))
    return compare(_distinct(labels), results)


def compare(labels: Sequence[str], results: Sequence[Result]) -> ResultComparison:
    """Compare results.

    Results whose recipe is the same and whose seeds differ are also averaged over the seeds.

    Args:
        labels: a name for each result, its column.
        results: the parsed results.
    """
    notes: list[str] = []
    if len({result.metric for result in results}) > 1:
        notes.append("the results have different metrics, so their metric rows do not compare")
    if len({(result.profile, result.target, result.evidence) for result in results}) > 1:
        notes.append("the results were not measured in the same way; see profile and evidence")
    return ResultComparison(
        labels=tuple(labels),
        rows=tuple(_rows(results)),
        seed_means=tuple(_seed_means(results, notes)),
        notes=tuple(notes),
    )


def _rows(results: Sequence[Result]) -> Iterator[FigureRow]:
    """The figures that at least one result has."""
    tables = [dict(_figures(result)) for result in results]
    for label in dict.fromkeys(label for table in tables for label in table):
        yield FigureRow(label, tuple(table.get(label) for table in tables))


def _figures(result: Result) -> Iterator[tuple[str, Measurement]]:
    models, student, against = result.models, result.student, result.comparison
    for role, label in (("teacher", "teacher"), ("baseline", "student alone")):
        if role in models:
            yield f"{result.metric}, {label}", models[role].metric
    yield f"{result.metric}, student distilled", student.metric
    optional = {
        "drop to the teacher": against.get("drop"),
        "gain over alone": against.get("baseline_gain"),
        "gap closed": against.get("gap_closed"),
        "latency p50": student.latency.get("p50_ms"),
        "latency p95": student.latency.get("p95_ms"),
        "speed-up": against.get("speedup"),
        "size": student.size_mb,
        "parameters": student.parameters,
        "peak memory": student.peak_memory_mb,
    }
    yield from ((label, figure) for label, figure in optional.items() if figure is not None)


def _seed_means(results: Sequence[Result], notes: list[str]) -> Iterator[SeedMeans]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.recipe is not None and result.seed is not None:
            groups.setdefault(result.recipe, []).append(result)
    for group in groups.values():
        seeds = [result.seed for result in group if result.seed is not None]
        if len(seeds) < 2:
            continue
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            notes.append(
                f"{group[0].name}: seed {repeated[0]} is given twice, so no mean over seeds"
            )
            continue
        rows = [_mean_row(row, len(group)) for row in _rows(group) if row.label not in _FIXED]
        yield SeedMeans(group[0].name, tuple(seeds), tuple(row for row in rows if row is not None))


def _mean_row(row: FigureRow, seeds: int) -> FigureRow | None:
    known = [figure for figure in row.figures if figure is not None and figure.value is not None]
    if not known:
        return None
    estimate = mean([figure.value for figure in known if figure.value is not None])
    weakest: Evidence = min(
        (figure.evidence for figure in known), key=lambda kind: EVIDENCE_STRENGTH[kind]
    )
    figure = estimate.figure(known[0].unit, weakest)
    if len(known) < seeds:
        note = f"{seeds - len(known)} of {seeds} seeds have no value"
        figure = replace(figure, note=note)
    return FigureRow(row.label, (figure,))


def _distinct(labels: Sequence[str]) -> list[str]:
    """The labels without the folders that they all share."""
    parts = [Path(label).parts for label in labels]
    while len(labels) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while len(labels) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return [str(Path(*p)) for p in parts]
