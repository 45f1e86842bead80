"""Stage distill: train the student with the teacher and, as the baseline, without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context, Job
from edgekd.stages.scheme_context import files_of_scheme, open_scheme_context
from edgekd.stages.student import FIRST_WEIGHTS, build_student
from edgekd.stages.task_data import open_task_data, write_json
from edgekd.stages.training import fit

STUDENT, BASELINE = "student.safetensors", "baseline.safetensors"


class DistillStage:
    """Writes the student's weights and history; with ``baseline`` also those without the
    teacher.
    """

    name = "distill"
    inputs = ("data", "teacher", "student")
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``distill`` and what the teacher's outputs depend on."""
        config = job.config
        return {
            # The cache's folder does not affect the outputs.
            "distill": config.distill.model_dump(mode="json", exclude={"cache": {"folder"}}),
            "losses": [term.model_dump(mode="json") for term in config.loss_terms],
            "files": files_of_scheme(job),
            "student": config.student.model_dump(mode="json", exclude={"checkpoint"}),
            "teacher": config.teacher.model_dump(mode="json", include={"model", "args"}),
            "seed": config.seed,
            "augment": list(config.data.augment),
            "task": [config.task, config.task_args],
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Train the student, and the baseline where it is wanted."""
        from edgekd.distill.objective import Objective
        from edgekd.distill.schemes import find_scheme
        from edgekd.models.weights import load_weights, save_weights

        task_data = open_task_data(inputs["data"], context.job.config)
        config = context.job.config.distill
        scheme_context = open_scheme_context(task_data, context, inputs)
        histories = dict(find_scheme(config.scheme)(scheme_context))
        save_weights(scheme_context.student, context.out / STUDENT)
        lacking = task_data.lacks_labels()
        if config.baseline and lacking:
            context.progress.message(f"  the student alone is not trained: {lacking}")
        elif config.baseline:
            alone = Objective.supervised(task_data.task, config.label_smoothing)
            model = build_student(task_data, inputs["student"])
            load_weights(model, inputs["student"] / FIRST_WEIGHTS, where="student")
            histories["baseline"] = fit(task_data, model, alone, config, "student alone", context)
            save_weights(model, context.out / BASELINE)
        for label, history in histories.items():
            name = f"{label.replace(' ', '-')}-history.json"
            write_json(context.out / name, history.to_json())
