"""``edgekd compare``: several results side by side."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from edgekd.errors import InputError
from edgekd.files import check_output, write_errors
from edgekd.measurement import full_text, interval_text, value_text
from edgekd.progress import Console
from edgekd.release.compare import ResultComparison, SeedMeans, compare_files, find_result


@click.command()
@click.argument(
    "paths", nargs=-1, required=True, metavar="RESULT|RUN…", type=click.Path(path_type=Path)
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here."
)
def compare(paths: tuple[Path, ...], json_path: Path | None) -> None:
    """Compare result files or run folders; average over the seeds of one pipeline."""
    if json_path is not None:
        read = [*paths, *map(find_result, paths)]
        check_output(json_path, "--json", inputs=read, stream=True)
    comparison = compare_files(paths)
    console = Console()
    console.print(_side_by_side(comparison))
    for means in comparison.seed_means:
        console.print()
        console.print(_over_seeds(means))
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if json_path is not None:
        text = json.dumps(comparison.to_json(), indent=1) + "\n"
        with write_errors(json_path, "the figures", error=InputError):
            json_path.write_text(text, encoding="utf-8")


def _side_by_side(comparison: ResultComparison) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("figure")
    for label in comparison.labels:
        table.add_column(escape(label), justify="right", overflow="fold")
    for row in comparison.rows:
        table.add_row(escape(row.label), *(escape(full_text(figure)) for figure in row.figures))
    return table


def _over_seeds(means: SeedMeans) -> Table:
    seeds = ", ".join(map(str, means.seeds))
    title = f"{escape(means.name)}: mean over {len(means.seeds)} seeds ({seeds})"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("figure", "mean", "95 % interval", "note"):
        table.add_column(heading, justify="left" if heading in ("figure", "note") else "right")
    for row in means.rows:
        figure = row.figures[0]
        note = figure.note if figure else ""
        table.add_row(
            escape(row.label), escape(value_text(figure)), interval_text(figure), escape(note)
        )
    return table
