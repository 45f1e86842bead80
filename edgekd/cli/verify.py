"""``edgekd verify``: whether a bundle's files are unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgekd.errors import edgerun_errors
from edgerun.manifest import verify as verify_bundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def verify(bundle: Path) -> None:
    """Check every file of BUNDLE (a folder or .tar.gz) against its manifest.

    Exit code 1 when a file is changed, missing or extra.
    """
    with edgerun_errors():
        problems = verify_bundle(bundle).problems
    for problem in problems:
        click.echo(problem)
    if problems:
        click.echo(f"{bundle}: {len(problems)} problem(s)")
        sys.exit(1)
    click.echo(f"{bundle}: intact")
