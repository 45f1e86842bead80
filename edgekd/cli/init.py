"""``edgekd init``: an example pipeline to start from."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgekd.errors import InputError
from edgekd.files import pipelines_folder


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("pipeline.yaml"))
@click.option("--example", default="digits", show_default=True, help="Which shipped pipeline.")
@click.option("--schema", is_flag=True, help="Write the JSON schema for editors instead.")
def init(path: Path, example: str, schema: bool) -> None:
    """Write an example pipeline to PATH (never over an existing file)."""
    from edgekd.errors import unknown_name

    if path.exists():
        raise InputError("the file exists already", where=str(path), remedy="give another path")
    if schema:
        from edgekd.config.pipeline import pipeline_schema

        text = json.dumps(pipeline_schema(), indent=1)
    else:
        examples = {file.stem: file for file in pipelines_folder().glob("*.yaml")}
        if example not in examples:
            raise unknown_name("example", example, examples, where="--example")
        text = examples[example].read_text(encoding="utf-8")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the file cannot be written: {error.strerror}",
            where=str(path),
            remedy="give a path in a folder that exists and that you may write to",
        ) from error
    click.echo(f"wrote {path}" + ("" if schema else f"; next: edgekd run {path}"))
