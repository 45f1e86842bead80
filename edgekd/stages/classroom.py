"""What a scheme of the distill stage works with, made from the pipeline's artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from edgekd.config.networks import ModelConfig, TeacherConfig
from edgekd.pipeline.fingerprint import file_sha256
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import Ground, fit, hub_identity, scale_output
from edgekd.stages.student import FIRST_WEIGHTS, build_student, check_logits
from edgekd.stages.teacher import load_teacher, open_teacher, some_samples

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill.history import History
    from edgekd.distill.objective import Objective
    from edgekd.distill.schemes import Classroom
    from edgekd.distill.teacher import Teacher
    from edgekd.models.named import NamedModel


def open_classroom(ground: Ground, context: Context, inputs: Mapping[str, Path]) -> Classroom:
    """The student with its first weights, its teacher, and how either is made anew."""
    import torch

    from edgekd.distill.objective import Objective
    from edgekd.distill.schemes import Classroom
    from edgekd.models.build import build_model
    from edgekd.models.repeatable import check_repeatable
    from edgekd.models.weights import load_weights

    pipeline = context.job.config
    outputs = ground.task.outputs(ground.dataset)

    def build(config: ModelConfig, index: int) -> NamedModel:
        torch.manual_seed(pipeline.seed + index * 1_000_003)
        where = "distill.scheme"
        model = build_model(config, ground.dataset.inputs, outputs, where=where)
        batch = some_samples(ground)
        check_repeatable(model, batch, where)
        check_logits(model, batch, ground, where)
        scale_output(ground, model)
        return model

    def new_student(index: int) -> NamedModel:
        model = build_student(ground, inputs["student"], index)
        if index:
            scale_output(ground, model)
            return model
        load_weights(model, inputs["student"] / FIRST_WEIGHTS, where="student")
        return model

    def train(
        model: nn.Module, objective: Objective, label: str, teacher: Teacher | None = None
    ) -> History:
        return fit(ground, model, objective, pipeline.distill, label, context, teacher)

    def another_teacher(config: TeacherConfig, label: str) -> Teacher:
        # With the pipeline's own seed the same section would give the same network once more.
        seed = (pipeline.seed + crc32(label.encode())) % 2**31
        own = replace(ground, config=pipeline.model_copy(update={"seed": seed}))
        return load_teacher(own, config, context, label)

    def new_objective() -> Objective:
        return Objective(pipeline.loss_terms, ground.task, pipeline.distill.label_smoothing)

    return Classroom(
        student=new_student(0),
        teacher=open_teacher(inputs["teacher"], ground),
        task=ground.task,
        label_smoothing=pipeline.distill.label_smoothing,
        fit=train,
        new_objective=new_objective,
        new_student=new_student,
        build=build,
        open_teacher=another_teacher,
        say=context.progress.message,
    )


def files_of_scheme(job: Job) -> dict[str, str]:
    """What the scheme's arguments name, such as an ensemble's members: SHA-256 of their files."""
    found: dict[str, str] = {}

    def look(value: Any, where: str) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                place = f"{where}.{key}"
                if key == "model" and isinstance(entry, str):
                    found.update({f"{place} {k}": v for k, v in hub_identity(entry).items()})
                elif key in ("checkpoint", "onnx") and isinstance(entry, str):
                    path = job.path(entry)
                    if path.is_file():
                        files = files_of_onnx(path) if key == "onnx" else [path]
                        found[place] = " ".join(map(file_sha256, files))
                else:
                    look(entry, place)
        elif isinstance(value, list | tuple):
            for index, entry in enumerate(value):
                look(entry, f"{where}[{index}]")

    from edgekd.engines.onnx import files_of_onnx

    look(job.config.distill.scheme.args, "distill.scheme")
    return found
