"""``edgekd doctor``: what this machine can do, what is missing, and which feature needs it."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from edgekd.doctor import Check, examine

_MARKS = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "note": "[yellow]–[/yellow]"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.option("--deep", is_flag=True, help="Also start torch and see what it can use (seconds).")
def doctor(as_json: bool, deep: bool) -> None:
    """Show what this machine can do, and what is missing for which feature."""
    checks = examine(deep=deep)
    if as_json:
        click.echo(json.dumps([check.to_json() for check in checks], indent=2))
        return
    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    table.add_column("for")
    for check in checks:
        table.add_row(_MARKS[check.status], check.name, check.detail, check.needed_for)
    console.print(table)
    _to_do(console, checks)


def _to_do(console: Console, checks: list[Check]) -> None:
    for status, heading in (("missing", "Missing"), ("note", "Optional")):
        rows = [check for check in checks if check.status == status and check.remedy]
        if rows:
            console.print(f"\n[bold]{heading}[/bold]")
        for check in rows:
            # Text from packages and the system may hold brackets, which rich reads as markup.
            console.print(
                f"  {check.name}, for {check.needed_for}: {check.remedy}",
                markup=False,
                highlight=False,
            )
    if not any(check.status == "missing" for check in checks):
        console.print("\nNothing that edgekd needs is missing.")
