"""``edgekd layers``: the module paths by which a loss names what it compares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgekd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.distill.features import Layer

_PIPELINE_SUFFIXES = (".yaml", ".yml")


@click.command()
@click.argument("model", metavar="MODEL|PIPELINE.yaml")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x28x28",
              help="One sample of an input, without the batch.")  # fmt: skip
@click.option("--classes", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="The pipeline's run folder.  [default: runs/<name>]")  # fmt: skip
def layers(model: str, shapes: tuple[str, ...], classes: int, output: Path | None) -> None:
    """List the layers of a network with their shapes.

    MODEL is a built-in name (convnet-s) or package.module:name. Of a pipeline file, the student
    and the teacher are listed with the shapes they have on its data.

    A loss names them in a pipeline: {attention: {student: PATH, teacher: PATH}, weight: 1000}.
    """
    console = Console()
    if model.endswith(_PIPELINE_SUFFIXES):
        from edgekd.api import execute, open_job, run_folder
        from edgekd.extension import searching
        from edgekd.stages.fitting import open_ground
        from edgekd.stages.listing import layers_of_pipeline

        if shapes:
            raise InputError(
                "a pipeline's data give the shapes", where="--shape", remedy="remove --shape"
            )
        job = open_job(model)
        outcome = execute(job, run_folder(job, output), "data")
        with searching(job.base):
            found = layers_of_pipeline(open_ground(outcome.folder("data"), job.config))
        for role, rows in found.items():
            console.print(_table(role, rows))
        if "teacher" not in found:
            console.print("the teacher is an ONNX file and shows no layers")
        return
    from edgekd.config.networks import ModelConfig
    from edgekd.stages.listing import layers_of_model

    with_here = dict(map(_shape, shapes))
    console.print(_table(model, layers_of_model(ModelConfig(model=model), with_here, classes)))


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.partition("=")
    try:
        return name, tuple(int(size) for size in sizes.split("x"))
    except ValueError as error:
        raise InputError(
            f"{text!r} is no shape", where="--shape", remedy="write NAME=1x28x28"
        ) from error


def _table(title: str, rows: Sequence[Layer]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("class")
    table.add_column("shape (batch first)")
    table.add_column("parameters", justify="right")
    for row in rows:
        table.add_row(row.path, row.kind, _shape_text(row), f"{row.parameters:,}")
    return table


def _shape_text(layer: Layer) -> Text:
    """The shape; as a plain text, for a table takes brackets for markup."""
    if layer.shape is None:
        return Text("–")
    return Text(f"[{', '.join(['batch', *map(str, layer.shape[1:])])}]")
