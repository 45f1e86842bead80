"""Stage distill: train the student with the teacher and, as the baseline, without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from edgekd.config.networks import ModelConfig, TeacherConfig
from edgekd.config.pipeline import PipelineConfig
from edgekd.errors import InputError
from edgekd.files import file_sha256
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.build_student import FIRST_WEIGHTS, build_student, check_logits
from edgekd.stages.comparison import COMPARISON, compare_students
from edgekd.stages.recipes import race_recipes
from edgekd.stages.task_data import TaskData, open_task_data, some_samples, write_json
from edgekd.stages.teacher import load_teacher, open_teacher
from edgekd.stages.training import fit, hub_fingerprint, scale_output

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill.checkpoint import History
    from edgekd.distill.objective import Objective
    from edgekd.distill.schemes import SchemeContext
    from edgekd.distill.teacher import Teacher
    from edgekd.models.dict_model import DictModel
    from edgekd.tasks import Task

STUDENT_WEIGHTS, BASELINE_WEIGHTS = "student.safetensors", "baseline.safetensors"
DISTILLED_WEIGHTS = "distilled.safetensors"
"""The distilled student where ``distill.keep: better`` ships the student alone."""


class DistillStage:
    """Writes the student's weights and history; with ``baseline`` also those without the teacher,
    and their comparison on validation data; with ``losses: auto`` the race of the recipes.
    """

    name = "distill"
    inputs = ("data", "teacher", "student")
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``distill`` and what the teacher's outputs depend on."""
        return {
            **training_settings(job.config),
            "files": files_of_scheme(job),
            "task": job.task_settings,
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Train the student, and the baseline where it is wanted."""
        from edgekd.distill.objective import Objective
        from edgekd.distill.schemes import find_scheme
        from edgekd.models.weights import load_weights, save_weights

        pipeline, out = context.job.config, context.out
        task_data, config = open_task_data(inputs["data"], pipeline), pipeline.distill
        if (lacking := task_data.lacks_labels()) and config.keep == "better":
            raise InputError(
                f"the student alone, which keep: better compares with, is not trained: {lacking}",
                where="distill.keep",
                remedy="give labels, or write keep: student",
            )
        scheme_context = open_scheme_context(task_data, context, inputs)
        if config.auto is not None:
            pipeline = race_recipes(task_data, scheme_context, context)
            scheme_context = replace(
                scheme_context, new_objective=lambda: new_objective(pipeline, task_data.task)
            )
        histories = dict(find_scheme(config.scheme)(scheme_context))
        save_weights(scheme_context.student, out / STUDENT_WEIGHTS)
        if config.baseline and lacking:
            context.progress.message(f"  the student alone is not trained: {lacking}")
        elif config.baseline:
            alone = Objective.supervised(task_data.task, config.label_smoothing)
            model = build_student(task_data, inputs["student"])
            load_weights(model, inputs["student"] / FIRST_WEIGHTS, where="student")
            histories["baseline"] = fit(task_data, model, alone, config, "student alone", context)
            save_weights(model, out / BASELINE_WEIGHTS)
            record = compare_students(
                task_data, pipeline, scheme_context, model, histories["student"]
            )
            write_json(out / COMPARISON, record)
            _report(record, context)
            if record["kept"] == "baseline":
                (out / STUDENT_WEIGHTS).rename(out / DISTILLED_WEIGHTS)
                save_weights(model, out / STUDENT_WEIGHTS)
        for label, history in histories.items():
            name = f"{label.replace(' ', '-')}-history.json"
            write_json(out / name, history.to_json())


def _report(record: Mapping[str, Any], context: Context) -> None:
    """Print the comparison; where the teacher is not shown to help, also why that may be."""
    say = context.progress.message
    say(f"  {record['sentence']}")
    for row in record["causes"]:
        say(f"    likely cause: {row['cause']} ({row['evidence']}); try {row['try']}")
    if record["keep"] == "better":
        say(f"  {record['kept_why']}")


def new_objective(pipeline: PipelineConfig, task: Task) -> Objective:
    """A fresh objective of the pipeline's loss terms."""
    from edgekd.distill.objective import Objective

    return Objective(pipeline.loss_terms, task, pipeline.distill.label_smoothing)


def training_settings(config: PipelineConfig) -> dict[str, Any]:
    """The settings that the student's training depends on, for a ``config_slice``."""
    return {
        # The cache's folder does not affect the outputs.
        "distill": config.distill.model_dump(mode="json", exclude={"cache": {"folder"}}),
        "losses": [t.model_dump(mode="json") for recipe in config.recipes for t in recipe],
        "student": config.student.model_dump(mode="json", exclude={"checkpoint", "search"}),
        "teacher": config.teacher.model_dump(mode="json", include={"model", "args"}),
        "augment": list(config.data.augment),
        "seed": config.seed,
    }


def open_scheme_context(
    task_data: TaskData, context: Context, inputs: Mapping[str, Path]
) -> SchemeContext:
    """The student with its initial weights, its teacher, and factories of further networks."""
    import torch

    from edgekd.distill.schemes import SchemeContext
    from edgekd.models.build import build_model
    from edgekd.models.dict_model import check_repeatable
    from edgekd.models.weights import load_weights

    pipeline = context.job.config

    def build(config: ModelConfig, index: int) -> DictModel:
        torch.manual_seed(pipeline.seed + index * 1_000_003)
        where = "distill.scheme"
        model = build_model(config, task_data.spec.inputs, task_data.spec.outputs, where=where)
        batch = some_samples(task_data)
        check_repeatable(model, batch, where)
        check_logits(model, batch, task_data, where)
        scale_output(task_data, model)
        return model

    def new_student(index: int) -> DictModel:
        model = build_student(task_data, inputs["student"], index)
        if index:
            scale_output(task_data, model)
            return model
        load_weights(model, inputs["student"] / FIRST_WEIGHTS, where="student")
        return model

    def train(
        model: nn.Module, objective: Objective, label: str, teacher: Teacher | None = None
    ) -> History:
        return fit(task_data, model, objective, pipeline.distill, label, context, teacher)

    def another_teacher(config: TeacherConfig, label: str) -> Teacher:
        # With the pipeline's own seed the same section would give the same network again.
        seed = (pipeline.seed + crc32(label.encode())) % 2**31
        own = replace(task_data, config=pipeline.model_copy(update={"seed": seed}))
        return load_teacher(own, config, context, label)

    return SchemeContext(
        student=new_student(0),
        teacher=open_teacher(inputs["teacher"], task_data),
        task=task_data.task,
        label_smoothing=pipeline.distill.label_smoothing,
        fit=train,
        new_objective=lambda: new_objective(pipeline, task_data.task),
        new_student=new_student,
        build=build,
        open_teacher=another_teacher,
        say=context.progress.message,
    )


def files_of_scheme(job: Job) -> dict[str, str]:
    """SHA-256 of the files that the scheme's arguments name, such as an ensemble's members."""
    found: dict[str, str] = {}

    def look(value: Any, where: str) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                place = f"{where}.{key}"
                if key == "model" and isinstance(entry, str):
                    found.update({f"{place} {k}": v for k, v in hub_fingerprint(entry).items()})
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

    from edgekd.onnx.file import files_of_onnx

    look(job.config.distill.scheme.args, "distill.scheme")
    return found
