"""``edgekd profiles``: the devices that a pipeline can be made for."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from edgekd.config.profile import (
    PowerMode,
    Profile,
    Quantity,
    SourcedText,
    SourcedValue,
    list_profiles,
    load_profile,
)
from edgekd.errors import InputError, printable
from edgekd.progress import Console


@click.group()
def profiles() -> None:
    """Device profiles: memory, budgets, precisions and runtime of each device."""


@profiles.command("list")
def list_command() -> None:
    """List the shipped profiles."""
    table = Table(box=None, pad_edge=False)
    for heading in ("profile", "memory", "budget", "device"):
        table.add_column(heading, no_wrap=heading != "device")
    for name in list_profiles():
        profile = load_profile(name)
        memory = f"{profile.memory.total_mb.value / 1000:.3g} GB" if profile.memory else "–"
        limits = profile.budget
        budget = ", ".join(
            f"{limit.value:g} {unit}"
            for limit, unit in ((limits.latency_ms, "ms"), (limits.memory_mb, "MB"))
            if limit is not None
        )
        table.add_row(name, memory, budget or "–", escape(profile.device))
    Console().print(table)


@profiles.command("show")
@click.argument("profile")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def show_command(profile: str, as_json: bool) -> None:
    """Show PROFILE (a name or a YAML file), every figure with its source."""
    loaded = load_profile(profile)
    if as_json:
        click.echo(loaded.model_dump_json(indent=2, exclude_none=True))
        return
    console = Console()
    console.print(
        f"[bold]{escape(loaded.name)}[/bold]  {escape(loaded.device)}  ({loaded.kind})",
        highlight=False,
    )
    threads = loaded.runtime.threads or "the runtime's choice"
    lines = {
        "precisions": ", ".join(loaded.precisions),
        "engine": f"{loaded.runtime.engine}, threads: {threads}",
        "providers": ", ".join(loaded.runtime.providers),
        "note": loaded.note,
    }
    for key, text in lines.items():
        if text:
            console.print(f"{key:10}  {text}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("source")
    table.add_column("verified")
    table.add_column("note")
    for key, stated in loaded.statements():
        verified = "yes" if stated.verified else "[yellow]no[/yellow]"
        table.add_row(
            escape(key), escape(shown(stated)), stated.source, verified, escape(stated.note or "")
        )
    console.print()
    console.print(table)


@profiles.command("check")
@click.argument("names", nargs=-1, metavar="[NAME|FILE]…")
def check_command(names: tuple[str, ...]) -> None:
    """Validate profiles (all shipped ones, or those given) and list unverified figures."""
    wrong = 0
    for name in names or tuple(list_profiles()):
        try:
            profile = load_profile(name)
        except InputError as error:
            wrong += 1
            wrong_text = f"{name}: wrong\n{error}".replace("\n", "\n  ")
            click.echo(printable(wrong_text), err=True)
            continue
        click.echo(printable(_verdict(name, profile)))
    if wrong:
        raise InputError(
            f"{wrong} profile(s) are wrong",
            where="edgekd profiles check",
            remedy="fix the lines named above",
        )


def _verdict(name: str, profile: Profile) -> str:
    label = profile.name if Path(name).stem == profile.name else f"{name} ({profile.name})"
    unverified = profile.unverified()
    total = sum(1 for _ in profile.statements())
    lines = [f"{label}: ok, {total} figures, {len(unverified)} unverified"]
    lines += [
        f"  unverified: {key} = {shown(stated)} ({stated.source})" for key, stated in unverified
    ]
    return "\n".join(lines)


def shown(stated: SourcedValue) -> str:
    """The value of a sourced figure as text."""
    if isinstance(stated, Quantity):
        return f"{stated.value:g}" if stated.value < 1e5 else f"{stated.value:.0f}"
    if isinstance(stated, SourcedText):
        return stated.value
    if isinstance(stated, PowerMode):
        return f"{stated.watts:g} W" if stated.watts else "no limit"
    raise TypeError(f"no text for {type(stated).__name__}")
