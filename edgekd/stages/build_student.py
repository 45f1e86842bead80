"""A student's network from its section: built, loaded, made smaller, and built again later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.networks import HUBS, TEACHERS_OWN, ModelConfig, StudentConfig, TeacherConfig
from edgekd.config.pipeline import PipelineConfig
from edgekd.errors import InputError
from edgekd.pipeline.stage import Job
from edgekd.stages.task_data import (
    STUDENT_SCHEMA,
    TaskData,
    read_json,
    some_samples,
    write_json,
)
from edgekd.stages.teacher import (
    WEIGHTS,
    plan_adaptation,
    read_adaptation,
    write_adaptation,
)
from edgekd.stages.training import scale_output
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Size, Tensor

    from edgekd.models.adapted import Adaptation
    from edgekd.models.dict_model import DictModel

FIRST_WEIGHTS, STRUCTURE, SECTION = "first.safetensors", "structure.json", "student.json"
"""The artifact's files: the initial weights; what was removed from the network; and, of a search,
the winner's section ``student``."""

SECTION_SCHEMA = "edgekd.student-section/1"
"""Of ``student.json``."""

_GRADIENT_BATCH, _GRADIENT_SAMPLES = 128, 1024
"""The importance ``taylor`` is computed on about so many labelled samples, in such batches."""

Say = Callable[[str], None]


def resolved_student(config: PipelineConfig, folder: Path | None) -> StudentConfig:
    """The section ``student``: the pipeline's, or the winner's of its search.

    Args:
        config: the pipeline.
        folder: the student stage's artifact; None: there is none yet.

    Raises:
        InputError: the pipeline searches for its student and has not yet done so.
    """
    if config.student.search is None:
        return config.student
    if folder is None or not (folder / SECTION).is_file():
        raise InputError(
            "the student is chosen by a search, which has not been run",
            where="student.search",
            remedy="run the stage student first: edgekd run PIPELINE --until student",
        )
    return StudentConfig.model_validate(read_json(folder / SECTION, SECTION_SCHEMA))


def with_student(task_data: TaskData, student: StudentConfig) -> TaskData:
    """The same data, in a pipeline with that student."""
    config = task_data.config.model_copy(update={"student": student})
    return replace(task_data, config=config)


def write_student(
    task_data: TaskData, job: Job, teacher: Path, out: Path, say: Say, check: bool = True
) -> tuple[DictModel, dict[str, Any]]:
    """Build the student of a pipeline, load its weights, make it smaller, and write it.

    ``out`` then has the initial weights, the structure and ``model.json``: all that
    :func:`build_student` reads.

    Args:
        task_data: the data, and a pipeline whose student is no search.
        job: for the files that the section names.
        teacher: the teacher stage's artifact.
        out: an empty folder.
        say: shows a message.
        check: whether it is run to see that its outputs are logits and the same each time; what is
            built in, and the teacher, are known to be so.

    Returns:
        The network with its initial weights, and the content of ``model.json``.

    Raises:
        InputError: the section does not fit the data, the teacher or the checkpoint.
    """
    from edgekd.models.dict_model import check_repeatable, count_parameters
    from edgekd.models.weights import load_weights, save_weights

    student = task_data.config.student
    student_network(task_data.config)
    if student.model == TEACHERS_OWN:
        write_adaptation(read_adaptation(teacher, task_data), out)
        model = build_student(task_data, out)
        load_weights(model, teacher / WEIGHTS, where="student")
    else:
        model = build_student(task_data, None)
        if student.checkpoint is None and (scaled := scale_output(task_data, model)):
            say(f"  student: {scaled}")
    if student.checkpoint is not None:
        notes = load_weights(
            model,
            job.existing_file(student.checkpoint, "student.checkpoint"),
            where="student.checkpoint",
            key=student.checkpoint_key,
            prefix=student.prefix,
        )
        for note in notes:
            say(f"  student: {note}")
    if check:
        batch = some_samples(task_data)
        check_repeatable(model, batch, "student.model")
        check_logits(model, batch, task_data, "student.model")
    model, described = _made_smaller(task_data, model, out, say)
    save_weights(model, out / FIRST_WEIGHTS)
    # The section, because networks that differ may have the same weights.
    section = student.model_dump(mode="json", exclude={"checkpoint"}, exclude_defaults=True)
    about = {"parameters": count_parameters(model), "section": section}
    spec = model.spec.to_json() | about | described
    write_json(out / "model.json", spec, STUDENT_SCHEMA)
    say(f"  student: {count_parameters(model):,} parameters")
    return model, spec


def build_student(task_data: TaskData, folder: Path | None, index: int = 0) -> DictModel:
    """The student's network with fresh weights drawn from the pipeline's seed.

    ``folder`` is the student stage's artifact, which records what was removed and, of a search,
    what won; None: the network before that. ``index`` is 0 for the student; another one draws other
    weights, for a scheme's additional students.

    Raises:
        InputError: the student is the teacher's network, and that is an ONNX file; or it is to be
            searched for.
    """
    import torch

    from edgekd.models.adapted import Adaptation, adapt
    from edgekd.models.build import build_model

    torch.manual_seed(task_data.config.seed + index * 1_000_003)
    spec = task_data.spec
    student = resolved_student(task_data.config, folder)
    task_data = with_student(task_data, student)
    network = student_network(task_data.config)
    if not student.inherits and network.model is not None and network.model.startswith(HUBS):
        network = network.model_copy(update={"args": {**network.args, "pretrained": False}})
    adaptation = Adaptation(task_data.task.output)
    if isinstance(network, TeacherConfig):
        # The teacher's own network uses the same adaptation to the data.
        adaptation = (
            read_adaptation(folder, task_data)
            if folder is not None
            else plan_adaptation(task_data, network)
        )
    adaptation = _with_resolution(task_data, adaptation)
    own = adaptation.network_spec(spec)
    model = adapt(build_model(network, own.inputs, own.outputs, where="student"), spec, adaptation)
    if folder is not None and (folder / STRUCTURE).is_file():
        from edgekd.students import apply_cuts, read_structure, skip_blocks

        cuts, dropped = read_structure(folder / STRUCTURE)
        before = {name: tensor.shape for name, tensor in model.state_dict().items()}
        skip_blocks(model, dropped)
        apply_cuts(model, cuts)
        if not student.inherits:
            _initialize_again(model, before)
    return model


def _initialize_again(model: DictModel, before: Mapping[str, Size]) -> None:
    """Draw the weights of layers that lost inputs or outputs for the width that they now have.

    ``before`` are the shapes of the network's tensors when they were drawn.
    """
    from torch import nn

    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            shape = layer.weight.shape
            if before.get(f"{path}.weight", shape) != shape:
                layer.reset_parameters()


def _with_resolution(task_data: TaskData, adaptation: Adaptation) -> Adaptation:
    """The adaptation that also resizes images to ``student.resolution``."""
    from edgekd.models.adapted import input_resolution

    resolution = task_data.config.student.resolution
    if resolution is None:
        return adaptation
    own = input_resolution(resolution, task_data.spec.inputs, adaptation.input, "student")
    return adaptation if own is None else replace(adaptation, input=own)


def check_logits(
    model: DictModel, batch: Mapping[str, Tensor], task_data: TaskData, where: str
) -> None:
    """Refuse to train a network that ends in a softmax, which the losses would apply again.

    Raises:
        InputError: its outputs are probabilities.
    """
    import torch

    from edgekd.models.adapted import recognized_form

    if not isinstance(task_data.task, Classification):
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        outputs = model.eval()(batch)[task_data.task.output]
    if recognized_form(outputs) == "probabilities":
        raise InputError(
            "the network's outputs are probabilities, which sum to 1, and the losses take logits: "
            "they would apply a softmax again",
            where=where,
            remedy="return what comes before the softmax (a log_softmax does no harm); the "
            "largest class is the same",
        )


def student_network(config: PipelineConfig) -> ModelConfig:
    """The student's model and its arguments: its own, or the teacher's.

    Raises:
        InputError: it is the teacher's, and the teacher is an ONNX file.
    """
    if config.student.model != TEACHERS_OWN:
        return config.student
    if config.teacher.model is None:
        raise InputError(
            "the student is to be the teacher's own network, and an ONNX file is not one that can "
            "be trained",
            where="student.model",
            remedy="give the teacher as a model with its checkpoint, or name the student's model",
        )
    return config.teacher


def _made_smaller(
    task_data: TaskData, model: DictModel, out: Path, say: Say
) -> tuple[DictModel, dict[str, Any]]:
    """Drop blocks of the student and prune it as configured, and write its structure."""
    from edgekd.students import drop_layers, prune, write_structure

    student, described = task_data.config.student, dict[str, Any]()
    if student.drop_layers is not None:
        model, dropped = drop_layers(model, student.drop_layers)
        write_structure(out / STRUCTURE, dropped=dropped)
        say(f"  dropped: {', '.join(dropped)}")
        described["dropped"] = dropped
    if student.prune is not None:
        if student.prune.importance == "taylor":
            _add_gradients(task_data, model)
        pruned = prune(model, student.prune, task_data.config.seed)
        write_structure(out / STRUCTURE, pruned.cuts, described.get("dropped", ()))
        say(f"  pruned: {pruned.summary()}")
        if pruned.left:
            left = "; ".join(f"{name} ({reason})" for name, reason in pruned.left.items())
            say(f"  not pruned: {left}")
        model = pruned.model
        described["pruned"] = pruned.to_json()
    if not student.inherits:
        model = build_student(task_data, out)
        if scaled := scale_output(task_data, model):
            say(f"  student: {scaled}")
    return model, described


def _add_gradients(task_data: TaskData, model: DictModel) -> None:
    """Give every parameter the gradient of the task's loss on labelled training samples.

    Raises:
        InputError: no training sample has a label.
    """
    import torch

    from edgekd.data.loader import Loader

    rows = task_data.labelled_rows("train")
    if len(rows) == 0:
        raise InputError(
            "the importance 'taylor' needs labels, and no training sample has one",
            where="student.prune.importance",
            remedy="use magnitude or lamp",
        )
    model.eval()
    loader = Loader("train", task_data.dataset, min(_GRADIENT_BATCH, len(rows)), rows=rows)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for number, batch in enumerate(loader.epoch(task_data.config.seed, 1), start=1):
        torch.autograd.backward(task_data.task.hard_loss(model(batch), batch))
        if number * _GRADIENT_BATCH >= _GRADIENT_SAMPLES:
            break
