"""``edgekd layers``: list the layers that a loss can name, with their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from edgekd.cli.options import is_pipeline
from edgekd.config.networks import ModelConfig
from edgekd.errors import InputError, edgerun_errors
from edgekd.progress import Console
from edgekd.spec import TensorSpec
from edgekd.stages.task_data import TaskData
from edgerun.model import parse_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.distill.features import Layer
    from edgekd.models.dict_model import DictModel


def layers_of_pipeline(
    task_data: TaskData, student: Path | None = None
) -> Mapping[str, list[Layer]]:
    """The layers of the student and of the teacher, unless that is an ONNX file.

    A student that will be made smaller is listed as it is before: the layers that remain keep
    their names.

    Args:
        task_data: the data and the pipeline.
        student: the student stage's artifact, where a search has chosen it; a student that is
            still to be searched for is not listed.
    """
    from edgekd.stages.build_student import build_student
    from edgekd.stages.teacher import build_teacher

    config = task_data.config.student
    networks = {}
    if student is not None:
        networks["student, chosen by the search"] = build_student(task_data, student)
    elif config.search is None:
        done = "pruned" if config.prune is not None else "made smaller"
        before = config.prune is not None or config.drop_layers is not None
        role = f"student, before it is {done}" if before else "student"
        networks[role] = build_student(task_data, None)
    if task_data.config.teacher.model is not None:
        networks["teacher"] = build_teacher(task_data)
    return {role: _listed(network) for role, network in networks.items()}


def layers_of_model(
    config: ModelConfig, inputs: Mapping[str, tuple[int, ...]], classes: int
) -> list[Layer]:
    """The layers of a network by its name.

    Args:
        config: the model and its arguments.
        inputs: the shape of one sample of each input, by name.
        classes: the size of its output.

    Raises:
        InputError: there is no such model, or it cannot take these shapes.
    """
    from edgekd.models.build import build_model, find_model

    if config.model is not None:
        find_model(config.model)
    if not inputs:
        raise InputError(
            "the shapes of a network's layers depend on its inputs, and none is given",
            where="--shape",
            remedy="give e.g. --shape image=1x28x28, or a pipeline file",
        )
    taken = [TensorSpec(name, ("batch", *shape)) for name, shape in inputs.items()]
    given = [TensorSpec("logits", ("batch", classes))]
    return _listed(build_model(config, taken, given))


def _listed(model: DictModel) -> list[Layer]:
    from edgekd.distill.features import list_layers
    from edgekd.models.build import example_batch

    return list_layers(model, example_batch(model.spec.inputs))


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
    if is_pipeline(model):
        from edgekd.api import execute, open_job, run_folder
        from edgekd.extension import searching
        from edgekd.pipeline.runner import plan
        from edgekd.stages import STAGES
        from edgekd.stages.task_data import open_task_data

        if shapes:
            raise InputError(
                "a pipeline's data give the shapes", where="--shape", remedy="remove --shape"
            )
        job = open_job(model)
        folder = run_folder(job, output)
        searched = job.config.student.search is not None
        chosen = searched and all(
            row.action == "cached" for row in plan(job, folder, STAGES, "student")
        )
        outcome = execute(job, folder, "student" if chosen else "data")
        with searching(job.base):
            student = outcome.folder("student") if chosen else None
            found = layers_of_pipeline(open_task_data(outcome.folder("data"), job.config), student)
        for role, rows in found.items():
            console.print(_table(role, rows))
        if searched and not chosen:
            console.print("the student is chosen by a search, which has not been run")
        if "teacher" not in found:
            console.print("the teacher is an ONNX file and shows no layers")
        return

    with edgerun_errors():
        inputs = parse_shapes(shapes)
    console.print(_table(model, layers_of_model(ModelConfig(model=model), inputs, classes)))


def _table(title: str, rows: Sequence[Layer]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("class")
    table.add_column("shape (batch first)")
    table.add_column("parameters", justify="right")
    for row in rows:
        table.add_row(Text(row.path), Text(row.kind), _shape_text(row), f"{row.parameters:,}")
    return table


def _shape_text(layer: Layer) -> Text:
    """The shape as rich Text, because a table would read a string's brackets as markup."""
    if layer.shape is None:
        return Text("–")
    return Text(f"[{', '.join(['batch', *map(str, layer.shape[1:])])}]")
