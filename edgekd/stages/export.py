"""Stage export: every network as an ONNX file with the same outputs as PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.pipeline.stage import Context, Job
from edgekd.stages.build_student import build_student
from edgekd.stages.distill import BASELINE_WEIGHTS, STUDENT_WEIGHTS
from edgekd.stages.task_data import TaskData, open_task_data, write_json
from edgekd.stages.teacher import BLACK_BOX, WEIGHTS, open_network, read_adaptation
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from edgekd.models.dict_model import DictModel
    from edgekd.onnx.samples import Array


class ExportStage:
    """Writes ``<role>.onnx`` and ``parity.json``; a mismatch fails the stage."""

    name = "export"
    inputs = ("data", "teacher", "student", "distill")
    libraries = ("torch", "onnx", "onnxruntime", "onnxscript")

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``export`` and what the networks depend on."""
        config = job.config
        return {
            "name": config.name,
            "export": config.export.model_dump(mode="json"),
            "student": config.student.model_dump(mode="json", include={"model", "args"}),
            "teacher": config.teacher.model_dump(mode="json", include={"model", "args"}),
            "task": job.task_settings,
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Export the networks and check their parity with PyTorch."""
        import torch

        from edgekd.models.dict_model import fold_output_scale
        from edgekd.models.weights import load_weights
        from edgekd.onnx.export import export_onnx
        from edgekd.onnx.import_onnx import adapt_onnx
        from edgekd.onnx.parity import check_parity, parity

        config = context.job.config
        task_data = open_task_data(inputs["data"], config)
        task = task_data.task
        samples = parity_samples(task_data)
        student = partial(build_student, folder=inputs["student"])
        teacher = partial(open_network, inputs["teacher"])
        sources: dict[str, tuple[Callable[[TaskData], DictModel], Path]] = {
            "student": (student, inputs["distill"] / STUDENT_WEIGHTS),
            "baseline": (student, inputs["distill"] / BASELINE_WEIGHTS),
            "teacher": (teacher, inputs["teacher"] / WEIGHTS),
        }
        reports = {}
        for role, (build, weights) in sources.items():
            if not weights.is_file():
                continue
            model = build(task_data)
            load_weights(model, weights, where=role)
            model.eval()
            fold_output_scale(model, {name: torch.from_numpy(a) for name, a in samples.items()})
            path = context.out / f"{role}.onnx"
            export_onnx(model, path, config.export.opset, metadata_of(task_data, role))
            report = parity(
                model,
                path,
                samples,
                task.output,
                config.export,
                classification=isinstance(task, Classification),
            )
            reports[role] = report.to_json()
            # Written before the check, so that a failure leaves its figures in the log.
            context.progress.message(f"  {role}: {report.summary()}")
            check_parity(report)
        black_box = inputs["teacher"] / BLACK_BOX
        if black_box.is_file():
            shutil.copyfile(black_box, context.out / BLACK_BOX)
            # The file takes the pipeline's samples and outputs the data's classes.
            adapt_onnx(
                context.out / BLACK_BOX,
                read_adaptation(inputs["teacher"], task_data),
                task_data.spec,
            )
        write_json(context.out / "parity.json", reports)


def parity_samples(task_data: TaskData) -> dict[str, Array]:
    """Validation samples to compare an ONNX file on; fewer than the largest batch are repeated."""
    from edgekd.onnx.parity import BATCH_SIZES

    count = min(task_data.config.export.samples, len(task_data.dataset.splits["validation"]))
    rows = np.arange(max(count, max(BATCH_SIZES))) % count
    inputs = task_data.dataset.model_inputs("validation", 0, count)
    return {name: array[rows] for name, array in inputs.items()}


def metadata_of(task_data: TaskData, role: str) -> dict[str, str]:
    """The metadata of an ONNX file: its role, and its class names, one per line."""
    labels = task_data.dataset.labels
    return {
        "edgekd.pipeline": task_data.config.name,
        "edgekd.role": role,
        "edgekd.task": task_data.task.name,
        **({"labels": "\n".join(labels)} if labels else {}),
    }
