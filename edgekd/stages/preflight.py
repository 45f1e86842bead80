"""Resolve every name of a pipeline before the first stage runs.

A misspelt loss is reported before the teacher is trained, not afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.errors import InputError
from edgekd.pipeline.stage import Job
from edgekd.stages.quantize import runtimes_of

if TYPE_CHECKING:
    from edgekd.tasks import Task


def preflight(job: Job, gated: bool = True) -> None:
    """Resolve the task, data source, augmentations, networks, losses, scheme, target and providers.

    Args:
        job: the pipeline and its profile.
        gated: whether the run includes the gate, which then needs a rule.

    Raises:
        InputError: a name is unknown, an argument does not fit, a module cannot be imported, a
            training's settings contradict each other, or the gate has nothing to check.
    """
    from edgekd.data.sources import find_source
    from edgekd.data.transforms import check_augmentations, mixing
    from edgekd.distill.distributed import training_device
    from edgekd.distill.objective import Objective
    from edgekd.distill.schemes import find_scheme
    from edgekd.distill.step import check_step
    from edgekd.engines.builder import ExternalBuilder
    from edgekd.engines.onnxruntime import provider_chain
    from edgekd.models.build import find_model
    from edgekd.release.rules import check_any_rule, check_direction
    from edgekd.stages.student import student_network
    from edgekd.students.pruning_plan import torch_pruning
    from edgekd.targets import open_target
    from edgekd.tasks import Classification, get_task

    config = job.config
    task = get_task(config.task, config.task_args)
    find_source(config.data.source)
    check_augmentations(config.data.augment)
    check_augmentations(config.distill.augment or (), "distill.augment")
    for name, where in (
        (config.teacher.model, "teacher.model"),
        (student_network(config).model, "student.model"),
    ):
        if name is not None:
            find_model(name, where)
    if config.student.prune is not None:
        torch_pruning()
    device = training_device()
    objective = Objective(config.loss_terms, task)
    check_step(config.distill, objective, device, None)
    mixed = mixing(config.data.augment if config.distill.augment is None
                   else config.distill.augment)  # fmt: skip
    if mixed is not None and objective.needs_hard_label:
        raise InputError(
            f"{', '.join(objective.needs_hard_label)} needs one class per sample, and the images "
            "and labels of two are mixed",
            where="distill.losses",
            remedy="leave mixup or cutmix out (distill.augment), or use soft_labels",
        )
    if config.distill.label_smoothing and not isinstance(task, Classification):
        raise InputError(
            f"label_smoothing has no meaning for the task {task.name}",
            where="distill.label_smoothing",
            remedy="remove it: there are no labels to smooth",
        )
    if config.teacher.train is not None:
        check_step(config.teacher.train, Objective.supervised(task), device, None)
    find_scheme(config.distill.scheme)
    open_target(config.target)
    for engine in config.engines:
        if engine.kind == "onnxruntime":
            provider_chain(job.profile.runtime.providers, engine.providers, engine.fallback)
        if engine.kind == "external":
            ExternalBuilder(engine)
    _check_quantization(job, task)
    check_direction(config.gate, task.metric, task.higher_is_better)
    if gated:
        check_any_rule(config.gate, job.profile, task.higher_is_better)


def _check_quantization(job: Job, task: Task) -> None:
    """Check the settings of ``quantize`` and TensorRT before anything is trained."""
    from edgekd.distill.objective import Objective
    from edgekd.engines.tensorrt import can_run_here, check_installed, where_built

    config = job.config
    wanted = config.quantize
    if wanted is not None:
        kinds = runtimes_of(job)
        if wanted.max_drop > 1 and (task.metric == "accuracy" or not task.higher_is_better):
            raise InputError(
                f"the budget is {wanted.max_drop:g}, and a drop of {task.metric} "
                + (
                    "goes from 0 to 1"
                    if task.higher_is_better
                    else "is a share, from 0 to 1, of the error of the best constant prediction"
                ),
                where="quantize.max_drop",
                remedy="write 0.01 for one hundredth",
            )
        if "tensorrt" not in kinds and wanted.precision == "bf16":
            raise InputError(
                "no engine of the pipeline computes in bfloat16",
                where="quantize.precision",
                remedy="use fp16, or add an engine: {kind: tensorrt-rtx}",
            )
        if "cpu" not in kinds and wanted.int8 in ("dynamic", "weights-only"):
            raise InputError(
                f"TensorRT has no {wanted.int8} INT8",
                where="quantize.int8",
                remedy="use static or qat",
            )
    if wanted is not None and wanted.int8 == "qat":
        from edgekd.distill.qat import check_training, terms_of_outputs
        from edgekd.distill.qat_quantizer import check_torchao

        check_torchao()
        check_training(wanted.qat)
        terms, _ = terms_of_outputs(config.loss_terms, wanted.qat.losses)
        where = "distill.losses" if wanted.qat.losses is None else "quantize.qat.losses"
        Objective(terms, task, wanted.qat.label_smoothing, where)
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
