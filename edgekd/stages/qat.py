"""Quantization-aware distillation within the quantize stage: from weights to an int8 file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.config.pipeline import (
    ExportConfig,
    QatConfig,
)
from edgekd.config.training import TrainConfig
from edgekd.errors import StageError
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.distill import STUDENT
from edgekd.stages.export import metadata_of
from edgekd.stages.student import build_student
from edgekd.stages.task_data import (
    TaskData,
)
from edgekd.stages.teacher import open_teacher
from edgekd.stages.training import fit
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill.checkpoint import History
    from edgekd.distill.qat_quantizer import QatRuntime
    from edgekd.models.dict_model import DictModel


def reduce_range(job: Job) -> bool:
    """Whether INT8 weights for a CPU have 7 bits: only older x86 processors need that.

    For a profile with another processor, which is then ARM, this machine is irrelevant.
    """
    from edgekd.config.host import saturates

    return job.profile.kind not in ("cpu-board", "jetson") and saturates()


_FAR = 0.25
"""Largest difference from PyTorch, relative to the output's largest value, that rounding can
explain: float32 noise moves a few activations by one of 255 steps; a wrongly exported graph
differs by far more."""


def train_quantized(
    task_data: TaskData,
    context: Context,
    inputs: Mapping[str, Path],
    runtime: QatRuntime,
    config: QatConfig,
    out: Path,
) -> History:
    """Continue the student's training with simulated 8-bit rounding, and write it as Q/DQ ONNX.

    The teacher, its cache, the augmentation and the data are those of the distillation; the
    objective is that of its terms that compare outputs, or ``config.losses``.

    Args:
        task_data: the data and the task.
        context: the stage's context; a stopped training is resumed from its scratch folder.
        inputs: the artifacts of the stages ``teacher``, ``student`` and ``distill``.
        runtime: determines how activations are rounded.
        config: the training.
        out: the ONNX file to write.

    Raises:
        InputError: torchao is missing, no loss is left, or the training or the network cannot
            be quantized so.
        StageError: the network cannot be traced, the training diverged, or the file does not
            give PyTorch's outputs.
    """
    from edgekd.distill.objective import Objective
    from edgekd.distill.qat import check_training, quantization_aware, terms_of_outputs
    from edgekd.distill.qat_model import computed_weights
    from edgekd.distill.qat_quantizer import check_torchao
    from edgekd.models.weights import load_weights
    from edgekd.onnx.export import export_onnx

    check_torchao()
    check_training(config)
    pipeline, label = context.job.config, f"student int8 {runtime}"
    terms, left_out = terms_of_outputs(pipeline.loss_terms, config.losses)
    if left_out:
        context.progress.message(
            f"  {label}: without {', '.join(left_out)}: the layers that are compared are not in "
            "the graph that is trained"
        )
    where = "distill.losses" if config.losses is None else "quantize.qat.losses"
    objective = Objective(terms, task_data.task, config.label_smoothing, where)
    # The cache and the augmentation are the distillation's, so that the teacher is not run again.
    training = pipeline.distill.model_copy(
        update={name: getattr(config, name) for name in TrainConfig.model_fields}
    )
    student = build_student(task_data, inputs["student"])
    load_weights(student, inputs["distill"] / STUDENT, where="student")
    if computed := computed_weights(student):
        context.progress.message(
            f"  {label}: {', '.join(computed)} {'is' if len(computed) == 1 else 'are'} trained on "
            "as plain weights: their parametrization is not part of the shipped model"
        )
    teacher = open_teacher(inputs["teacher"], task_data) if objective.needs_teacher else None

    def train(model: nn.Module) -> History:
        return fit(task_data, model, objective, training, label, context, teacher)

    narrow = runtime == "cpu" and reduce_range(context.job)
    result = quantization_aware(student, runtime, train, narrow)
    export_onnx(result.model, out, pipeline.export.opset, metadata_of(task_data, "student"))
    context.progress.message(f"  {label}: {_check_answers(result.model, out, task_data)}")
    return result.history


def _check_answers(model: DictModel, path: Path, task_data: TaskData) -> str:
    """Compare the file with the converted network over validation samples.

    Returns:
        A one-line summary.

    Raises:
        StageError: they are further apart than rounding explains.
    """
    import torch

    from edgekd.onnx.parity import BATCH_SIZES, parity

    config = task_data.config.export
    count = min(config.samples, len(task_data.dataset.splits["validation"]))
    again = np.arange(max(count, max(BATCH_SIZES))) % count
    arrays = task_data.dataset.model_inputs("validation", 0, count)
    samples = {name: array[again] for name, array in arrays.items()}
    with torch.inference_mode():
        answers = model({name: torch.from_numpy(array) for name, array in samples.items()})
    largest = {name: float(tensor.abs().max()) for name, tensor in answers.items()}
    report = parity(
        model,
        path,
        samples,
        task_data.task.output,
        ExportConfig(samples=config.samples),
        classification=isinstance(task_data.task, Classification),
    )
    shares: dict[str, float] = {}
    for row in report.rows:
        if row.max_absolute is None or row.max_absolute > _FAR * largest[row.output]:
            raise StageError(
                f"{path.name} does not give PyTorch's outputs: output {row.output!r} at batch "
                f"size {row.batch_size} differs by {row.max_absolute} where the largest value is "
                f"{largest[row.output]:.4g}",
                where=f"parity of {path.name}",
                remedy="try another opset (export: {opset: …}), or set int8: static",
            )
        shares[row.output] = max(
            shares.get(row.output, 0.0), row.max_absolute / (largest[row.output] or 1.0)
        )
    return "parity with PyTorch: max |Δ| " + ", ".join(
        f"{share:.1%} of the largest {name}" for name, share in shares.items()
    )
