"""The stages of a pipeline in their order, one file each, and the check before the first runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.config.recipes import recipe_text
from edgekd.errors import InputError
from edgekd.pipeline.stage import Job, Stage
from edgekd.stages.benchmark import BenchmarkStage
from edgekd.stages.bundle import BundleStage
from edgekd.stages.data import DataStage
from edgekd.stages.distill import DistillStage
from edgekd.stages.engines import EnginesStage
from edgekd.stages.export import ExportStage
from edgekd.stages.gate import GateStage
from edgekd.stages.quantize import QuantizeStage, qat_objective, runtimes_of
from edgekd.stages.report import ReportStage
from edgekd.stages.student import StudentStage
from edgekd.stages.teacher import TeacherStage

if TYPE_CHECKING:
    from edgekd.config.pipeline import PipelineConfig
    from edgekd.tasks import Task

STAGES: tuple[Stage, ...] = (
    DataStage(),
    TeacherStage(),
    StudentStage(),
    DistillStage(),
    ExportStage(),
    QuantizeStage(),
    EnginesStage(),
    BenchmarkStage(),
    GateStage(),
    ReportStage(),
    BundleStage(),
)


def preflight(job: Job, gated: bool = True) -> None:
    """Resolve the task, data source, augmentations, networks, losses, scheme, target and providers.

    Args:
        job: the pipeline and its profile.
        gated: whether the run includes the gate, which then needs a rule.

    Raises:
        InputError: a name is unknown, an argument does not fit, a module cannot be imported, a
            training's settings contradict each other, or the gate has nothing to check.
        TargetError: the gate's target cannot be reached, or has no runtime.
    """
    from edgekd.data.sources import find_source
    from edgekd.data.transforms import check_augmentations, mixing
    from edgekd.distill.distributed import training_device
    from edgekd.distill.objective import Objective
    from edgekd.distill.optimizer import check_train_config
    from edgekd.distill.schemes import find_scheme
    from edgekd.engines.builder import ExternalBuilder
    from edgekd.engines.onnxruntime import provider_chain
    from edgekd.models.build import check_model
    from edgekd.stages.build_student import student_network
    from edgekd.stages.search import check_search
    from edgekd.stages.training import augmentation_of
    from edgekd.students.pruning_plan import torch_pruning
    from edgekd.targets import SshTarget, open_target
    from edgekd.tasks import Classification, get_task

    config = job.config
    task = get_task(config.task, config.task_args)
    find_source(config.data.source)
    check_augmentations(config.data.augment)
    check_augmentations(config.distill.augment or (), "distill.augment")
    check_model(config.teacher, "teacher")
    _open_black_boxes(job)
    if config.student.search is not None:
        check_search(job)
    else:
        check_model(student_network(config), "student")
    if config.student.prune is not None:
        torch_pruning()
    device = training_device()
    mixed = mixing(augmentation_of(config, config.distill)) is not None
    auto = config.distill.auto
    for index, recipe in enumerate(config.recipes):
        # The default terms come first, and then those that are named.
        own = auto is not None and auto.recipes is not None and index > 0
        where = f"distill.losses.auto, {recipe_text(recipe)}" if own else "distill.losses"
        objective = Objective(recipe, task, where=where)
        check_train_config(config.distill, objective, device)
        # Of the built-in recipes those that do not fit are left out.
        if mixed and objective.needs_hard_label and (auto is None or own):
            raise InputError(
                f"{', '.join(objective.needs_hard_label)} needs one class per sample, and the "
                "images and labels of two are mixed",
                where=where,
                remedy="leave mixup or cutmix out (distill.augment), or use soft_labels",
            )
    if auto is not None:
        _check_race(config, task)
    if config.distill.label_smoothing and not isinstance(task, Classification):
        raise InputError(
            f"label_smoothing has no meaning for the task {task.name}",
            where="distill.label_smoothing",
            remedy="remove it: there are no labels to smooth",
        )
    if config.teacher.train is not None:
        check_train_config(config.teacher.train, Objective.supervised(task), device)
    find_scheme(config.distill.scheme)
    target = open_target(config.target)
    if gated and isinstance(target, SshTarget):
        # Found now, and not after a night of training.
        target.check_runtime()
        target.close()
    for engine in config.engines:
        if engine.kind == "onnxruntime":
            provider_chain(job.profile.runtime.providers, engine.providers, engine.fallback)
        if engine.kind == "external":
            ExternalBuilder(engine)
    _check_quantization(job, task)
    job.budgets.check_metric(task.metric, task.higher_is_better)
    if gated:
        job.budgets.require_any(task.higher_is_better)


def _open_black_boxes(job: Job) -> None:
    """Open the ONNX files of teachers in another process first: some end the one that does.

    Raises:
        EdgekdError: a file is missing, or ONNX Runtime cannot open it.
    """
    from edgekd.targets import LocalTarget

    scheme = job.config.distill.scheme.args
    members = [member for value in scheme.values() if isinstance(value, list) for member in value]
    sections = [("teacher", job.config.teacher.model_dump()), ("distill.scheme", scheme)]
    sections += [("distill.scheme", m) for m in members if isinstance(m, dict)]
    for where, section in sections:
        if isinstance(onnx := section.get("onnx"), str):
            path = job.existing_file(onnx, f"{where}.onnx")
            LocalTarget().probe(path, threads=1, run=False)


def _check_race(config: PipelineConfig, task: Task) -> None:
    """Check that the recipes of ``losses: auto`` can be raced."""
    from edgekd.students.race_storage import import_optuna
    from edgekd.tasks.continuous import ContinuousTask

    import_optuna("distill.losses")
    numbers = isinstance(task, ContinuousTask)
    if numbers and any(t.name == "multi_label" for recipe in config.recipes for t in recipe):
        raise InputError(
            "multi_label reads the outputs as logits, and the default terms, which are always in "
            "the race, as numbers",
            where="distill.losses.auto",
            remedy="name the losses, or leave multi_label out",
        )


def _check_quantization(job: Job, task: Task) -> None:
    """Check the settings of ``quantize`` and TensorRT before anything is trained."""
    from edgekd.engines.tensorrt import can_run_here, check_installed, where_built

    config = job.config
    quantize = config.quantize
    if quantize is not None:
        kinds = runtimes_of(job)
        if quantize.max_drop > 1 and (task.metric == "accuracy" or not task.higher_is_better):
            raise InputError(
                f"the budget is {quantize.max_drop:g}, and a drop of {task.metric} "
                + (
                    "goes from 0 to 1"
                    if task.higher_is_better
                    else "is a share, from 0 to 1, of the error of the best constant prediction"
                ),
                where="quantize.max_drop",
                remedy="write 0.01 for one hundredth",
            )
        if "tensorrt" not in kinds and quantize.precision == "bf16":
            raise InputError(
                "no engine of the pipeline computes in bfloat16",
                where="quantize.precision",
                remedy="use fp16, or add an engine: {kind: tensorrt-rtx}",
            )
        if "cpu" not in kinds and quantize.int8 in ("dynamic", "weights-only"):
            raise InputError(
                f"TensorRT has no {quantize.int8} INT8",
                where="quantize.int8",
                remedy="use static or qat",
            )
    if quantize is not None and quantize.int8 == "qat":
        for recipe in config.recipes:
            qat_objective(config.with_losses(recipe), quantize.qat, task)
    for index, engine in enumerate(config.engines):
        where, first = f"engines[{index}]", index == 0
        elsewhere = where_built(engine.kind, job.profile) == "on the device"
        if not elsewhere:
            check_installed(engine.kind, where)
        reason = f"it is built on {job.profile.name}" if elsewhere else can_run_here(engine.kind)
        if first and engine.kind != "onnxruntime" and reason is not None:
            raise InputError(
                f"the first engine is what is measured, and {engine.kind} cannot run here: "
                f"{reason}",
                where=where,
                remedy="put onnxruntime first and this one after it, or run the pipeline on the "
                "device",
            )
