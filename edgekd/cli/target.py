"""``edgekd target``: the machines to measure on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from edgekd.errors import InputError, printable
from edgekd.progress import Console

_SETTINGS = (
    ("--user", "The user there."),
    ("--key", "File of the private key."),
    ("--known-hosts", "File of the known host keys."),
    ("--ssh-config", "A configuration of OpenSSH instead of ~/.ssh/config."),
    ("--python", "Python there."),
    ("--folder", "Working folder there."),
    ("--power-mode", "Power mode that it must have when it measures."),
)


@click.group()
def target() -> None:
    """The machines to measure on: named in ~/.config/edgekd/targets.yaml (or EDGEKD_TARGETS)."""


def _options(command: Any) -> Any:
    for option, text in reversed(_SETTINGS):
        command = click.option(option, help=text)(command)
    return command


@target.command()
@click.argument("name")
@click.argument("host", metavar="HOST|ssh://USER@HOST:PORT")
@click.option("--port", type=int, help="Port of its SSH server.")
@_options
def add(name: str, host: str, **settings: Any) -> None:
    """Name a machine; nothing is connected to yet (edgekd target check NAME does)."""
    from edgekd.config.targets import SSH, add_target, find_target

    given = {key: value for key, value in settings.items() if value is not None}
    named = (
        find_target(host, "edgekd target add").model_dump(exclude_unset=True, exclude_none=True)
        if host.startswith(SSH)
        else {"host": host}
    )
    path = add_target(name, {**named, **given})
    click.echo(printable(f"{name} is added to {path}; next: edgekd target check {name}"))


@target.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the settings as JSON.")
def list_command(as_json: bool) -> None:
    """List the named machines."""
    from edgekd.config.targets import load_targets, targets_file

    known = load_targets()
    if as_json:
        rows = {name: config.model_dump(exclude_unset=True) for name, config in known.items()}
        click.echo(json.dumps(rows, indent=2))
        return
    if not known:
        click.echo(printable(f"no machine is named in {targets_file()}: edgekd target add"))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("target", "machine", "settings"):
        table.add_column(heading, no_wrap=heading == "target", overflow="fold")
    for name, config in known.items():
        others = config.model_dump(exclude_unset=True, exclude={"host", "user", "port"})
        text = ", ".join(f"{key}: {value}" for key, value in others.items())
        table.add_row(name, escape(config.address), escape(text))
    Console().print(table)


@target.command()
@click.argument("name")
def remove(name: str) -> None:
    """Forget a named machine; nothing is changed on it."""
    from edgekd.config.targets import remove_target

    click.echo(printable(f"{name} is removed from {remove_target(name)}"))


@target.command()
@click.argument("name", metavar="NAME|ssh://USER@HOST|local")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def check(name: str, as_json: bool) -> None:
    """Connect, and say what the machine is and what it lacks. Exit code 1 if something is."""
    from edgekd.targets import SshTarget, open_target
    from edgerun.board import describe_board

    opened = open_target(name, "edgekd target check")
    board = opened.board() if isinstance(opened, SshTarget) else describe_board()
    if as_json:
        click.echo(json.dumps(board, indent=2))
    else:
        _print_board(board)
    if board["missing"]:
        click.get_current_context().exit(1)


def _print_board(board: dict[str, Any]) -> None:
    from edgerun.board import board_lines

    console = Console()
    for line in board_lines(board):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for lack in board["missing"]:
        text = f"missing: {lack['what']}: {lack['remedy']}"
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not board["missing"]:
        console.print("nothing is missing", style="green")


@target.command()
@click.argument("name", metavar="NAME|ssh://USER@HOST")
@click.option("--wheels", type=click.Path(path_type=Path), metavar="FOLDER", help="Install these "
              "wheels, which are carried over; nothing is downloaded.")  # fmt: skip
@click.option("--offline", is_flag=True, help="Download the wheels here and carry them over.")
@click.option("--package", "packages", multiple=True, metavar="SPEC", help="What to install, as "
              "pip names it.  [default: numpy, onnxruntime]")  # fmt: skip
def bootstrap(name: str, wheels: Path | None, offline: bool, packages: tuple[str, ...]) -> None:
    """Make a virtual environment in the working folder there, with numpy and ONNX Runtime."""
    from edgekd.targets import SshTarget, open_target
    from edgekd.targets.bootstrap import PACKAGES
    from edgekd.targets.bootstrap import bootstrap as install

    if wheels is not None and offline:
        raise InputError(
            "--wheels and --offline contradict each other",
            where="edgekd target bootstrap",
            remedy="leave one of them out",
        )
    opened = open_target(name, "edgekd target bootstrap")
    if not isinstance(opened, SshTarget):
        raise InputError(
            f"{name!r} is not reached by SSH", where="edgekd target bootstrap", remedy="pip install"
        )

    def say(text: str) -> None:
        click.echo(printable(text))

    found = install(opened, packages or PACKAGES, wheels, offline, say)
    say(", ".join(f"{key} {value}" for key, value in found.items()))
