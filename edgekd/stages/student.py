"""Stage student: the network that will be shipped, with its initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.networks import TEACHERS_OWN, ModelConfig, TeacherConfig
from edgekd.config.pipeline import PipelineConfig
from edgekd.errors import InputError
from edgekd.files import file_sha256
from edgekd.pipeline.fingerprint import library_versions
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.task_data import (
    STUDENT_SCHEMA,
    TaskData,
    open_task_data,
    some_samples,
    write_json,
)
from edgekd.stages.teacher import (
    WEIGHTS,
    plan_adaptation,
    read_adaptation,
    write_adaptation,
)
from edgekd.stages.training import hub_fingerprint, scale_output
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.models.dict_model import DictModel
    from edgekd.students import Pruned

FIRST_WEIGHTS, STRUCTURE = "first.safetensors", "structure.json"
"""The artifact's files: the initial weights, and the channels removed by pruning."""

_GRADIENT_BATCH, _GRADIENT_SAMPLES = 128, 1024
"""The importance ``taylor`` is computed on about so many labelled samples, in such batches."""


class StudentStage:
    """Writes the initial weights, from which the student and its baseline both start.

    For a pruned student also the removed channels, with which :func:`build_student` builds it.
    """

    name = "student"
    inputs = ("data", "teacher")
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``student`` and what its network depends on."""
        student = job.config.student
        files = {}
        if student.checkpoint is not None:
            files["checkpoint"] = file_sha256(
                job.existing_file(student.checkpoint, "student.checkpoint")
            )
        network = job.config.teacher if student.model == TEACHERS_OWN else student
        return {
            "student": student.model_dump(mode="json", exclude={"checkpoint"}),
            "preprocess": _preprocess_of(job),
            "network": network.model_dump(mode="json", include={"model", "args"}),
            "seed": job.config.seed,
            "task": job.task_settings,
            **files,
            **hub_fingerprint(network.model),
            **(library_versions(("torch-pruning",)) if student.prune is not None else {}),
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Build, and where configured prune, the student."""
        from edgekd.models.dict_model import check_repeatable, count_parameters
        from edgekd.models.weights import load_weights, save_weights

        job = context.job
        task_data = open_task_data(inputs["data"], job.config)
        student = job.config.student
        student_network(job.config)
        if student.model == TEACHERS_OWN:
            write_adaptation(read_adaptation(inputs["teacher"], task_data), context.out)
            model = build_student(task_data, context.out)
            load_weights(model, inputs["teacher"] / WEIGHTS, where="student")
        else:
            model = build_student(task_data, None)
            if student.checkpoint is None and (scaled := scale_output(task_data, model)):
                context.progress.message(f"  student: {scaled}")
        if student.checkpoint is not None:
            notes = load_weights(
                model,
                job.existing_file(student.checkpoint, "student.checkpoint"),
                where="student.checkpoint",
                key=student.checkpoint_key,
                prefix=student.prefix,
            )
            for note in notes:
                context.progress.message(f"  student: {note}")
        batch = some_samples(task_data)
        check_repeatable(model, batch, "student.model")
        check_logits(model, batch, task_data, "student.model")
        described: dict[str, Any] = {}
        if student.prune is not None:
            pruned = _pruned(task_data, model, context)
            model, described = pruned.model, {"pruned": pruned.to_json()}
        save_weights(model, context.out / FIRST_WEIGHTS)
        spec = model.spec.to_json() | {"parameters": count_parameters(model)}
        write_json(context.out / "model.json", spec | described, STUDENT_SCHEMA)
        context.progress.message(f"  student: {count_parameters(model):,} parameters")


def build_student(task_data: TaskData, folder: Path | None, index: int = 0) -> DictModel:
    """The student's network with fresh weights drawn from the pipeline's seed.

    ``folder`` is the student stage's artifact, which records what was pruned; None: the network
    before pruning. ``index`` is 0 for the student; another one draws other weights, for a
    scheme's additional students.

    Raises:
        InputError: the student is the teacher's network, and that is an ONNX file.
    """
    import torch

    from edgekd.models.adapted import Adaptation, adapt
    from edgekd.models.build import build_model

    torch.manual_seed(task_data.config.seed + index * 1_000_003)
    spec = task_data.spec
    network = student_network(task_data.config)
    adaptation = Adaptation(task_data.task.output)
    if isinstance(network, TeacherConfig):
        # The teacher's own network uses the same adaptation to the data.
        adaptation = (
            read_adaptation(folder, task_data)
            if folder is not None
            else plan_adaptation(task_data, network)
        )
    own = adaptation.network_spec(spec)
    model = adapt(build_model(network, own.inputs, own.outputs, where="student"), spec, adaptation)
    if folder is not None and (folder / STRUCTURE).is_file():
        from edgekd.students import apply_cuts, read_cuts

        apply_cuts(model, read_cuts(folder / STRUCTURE))
    return model


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


def _pruned(task_data: TaskData, model: DictModel, context: Context) -> Pruned:
    """Prune the student as configured, and write its structure."""
    from edgekd.students import prune, write_cuts

    config = task_data.config.student.prune
    assert config is not None
    if config.importance == "taylor":
        _add_gradients(task_data, model)
    pruned = prune(model, config, task_data.config.seed)
    write_cuts(pruned.cuts, context.out / STRUCTURE)
    context.progress.message(f"  pruned: {pruned.summary()}")
    if pruned.left:
        left = "; ".join(f"{name} ({reason})" for name, reason in pruned.left.items())
        context.progress.message(f"  not pruned: {left}")
    return pruned


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


def _preprocess_of(job: Job) -> dict[str, Any] | None:
    """The preprocessing of a student that is the teacher's network."""
    own = job.config.teacher.preprocess
    if own is None or job.config.student.model != TEACHERS_OWN:
        return None
    return own.model_dump(mode="json")
