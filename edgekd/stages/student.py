"""Stage student: the network that will be shipped, with its first weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import InputError
from edgekd.pipeline.fingerprint import file_sha256
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import Ground, hub_identity, open_ground, write_json

if TYPE_CHECKING:
    from edgekd.models.named import NamedModel

FIRST_WEIGHTS = "first.safetensors"


class StudentStage:
    """Writes the first weights, from which the student and its baseline both start."""

    name = "student"
    inputs = ("data",)
    code = ("edgekd.stages.student", "edgekd.models", "edgekd.tasks")
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        student = job.config.student
        files = {}
        if student.checkpoint is not None:
            files["checkpoint"] = file_sha256(_checkpoint(job, student.checkpoint))
        return {
            "student": student.model_dump(mode="json", exclude={"checkpoint"}),
            "seed": job.config.seed,
            "task": [job.config.task, job.config.task_args],
            **files,
            **hub_identity(student.model),
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.models.named import count_parameters
        from edgekd.models.weights import load_weights, save_weights

        job = context.job
        ground = open_ground(inputs["data"], job.config)
        model = build_student(ground)
        if job.config.student.checkpoint is not None:
            load_weights(
                model,
                _checkpoint(job, job.config.student.checkpoint),
                where="student.checkpoint",
            )
        save_weights(model, context.out / FIRST_WEIGHTS)
        spec = model.spec.to_json() | {"parameters": count_parameters(model)}
        write_json(context.out / "model.json", spec)
        context.progress.message(f"  student: {count_parameters(model):,} parameters")


def build_student(ground: Ground) -> NamedModel:
    """The student's network with fresh weights drawn from the pipeline's seed."""
    import torch

    from edgekd.models.build import build_model

    torch.manual_seed(ground.config.seed)
    outputs = ground.task.outputs(ground.dataset)
    return build_model(ground.config.student, ground.dataset.inputs, outputs, where="student")


def _checkpoint(job: Job, name: str) -> Path:
    path = job.path(name)
    if not path.is_file():
        raise InputError(
            f"the file {name!r} does not exist",
            where="student.checkpoint",
            remedy=f"give a path from the pipeline file's folder; looked at {path}",
        )
    return path
