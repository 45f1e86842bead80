"""The layers of a network with their shapes, to name them in a pipeline's losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgekd.config.networks import ModelConfig
from edgekd.errors import InputError
from edgekd.spec import TensorSpec
from edgekd.stages.fitting import Ground

if TYPE_CHECKING:
    from edgekd.distill.features import Layer
    from edgekd.models.named import NamedModel


def layers_of_pipeline(ground: Ground) -> Mapping[str, list[Layer]]:
    """The layers of the student and of the teacher, unless that is an ONNX file.

    A student that will be pruned is listed as it is before: it keeps its layers and their names.
    """
    from edgekd.stages.student import build_student
    from edgekd.stages.teacher import build_teacher

    role = "student" if ground.config.student.prune is None else "student, before it is pruned"
    networks = {role: build_student(ground, None)}
    if ground.config.teacher.model is not None:
        networks["teacher"] = build_teacher(ground)
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


def _listed(model: NamedModel) -> list[Layer]:
    from edgekd.distill.features import list_layers
    from edgekd.models.build import example_batch

    return list_layers(model, example_batch(model.spec.inputs))
