"""Stage distill: train the student under the teacher, and alone to measure what that gained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import TRAINING_CODE, fit, open_ground, write_json
from edgekd.stages.student import FIRST_WEIGHTS, build_student
from edgekd.stages.teacher import open_teacher

STUDENT, BASELINE = "student.safetensors", "baseline.safetensors"


class DistillStage:
    """Writes the student's weights and history; with ``baseline`` also the student's alone."""

    name = "distill"
    inputs = ("data", "teacher", "student")
    code = ("edgekd.stages.distill", *TRAINING_CODE)
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        config = job.config
        return {
            "distill": config.distill.model_dump(mode="json"),
            "student": config.student.model_dump(mode="json", exclude={"checkpoint"}),
            "teacher": config.teacher.model_dump(mode="json", include={"model", "args"}),
            "seed": config.seed,
            "augment": list(config.data.augment),
            "task": [config.task, config.task_args],
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.distill.objective import Objective
        from edgekd.models.weights import load_weights, save_weights

        ground = open_ground(inputs["data"], context.job.config)
        config = context.job.config.distill
        teacher = open_teacher(inputs["teacher"], ground)

        runs = [
            (
                "student",
                STUDENT,
                Objective(context.job.config.loss_terms, ground.task, config.label_smoothing),
            )
        ]
        if config.baseline:
            alone = Objective.supervised(ground.task, config.label_smoothing)
            runs.append(("student alone", BASELINE, alone))
        for label, file, objective in runs:
            model = build_student(ground)
            load_weights(model, inputs["student"] / FIRST_WEIGHTS, where="student")
            history = fit(ground, model, objective, config, label, context, teacher)
            save_weights(model, context.out / file)
            write_json(context.out / f"{Path(file).stem}-history.json", history)
