"""Stage student: the network that will be shipped, with its initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.config.networks import TEACHERS_OWN
from edgekd.files import file_sha256
from edgekd.pipeline.fingerprint import library_versions
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.build_student import write_student
from edgekd.stages.task_data import open_task_data
from edgekd.stages.training import hub_fingerprint


class StudentStage:
    """Writes the initial weights, from which the student and its baseline both start.

    With ``search`` they are those of the winner, whose section is written too. For one made
    smaller also what was removed, with which :func:`build_student` builds it.
    """

    name = "student"
    inputs = ("data", "teacher")
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``student`` and what its network depends on."""
        student = job.config.student
        if student.search is not None:
            from edgekd.stages.search import search_settings

            return search_settings(job)
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
        """Build, and where configured make smaller, the student."""
        if context.job.config.student.search is not None:
            from edgekd.stages.search import run_search

            run_search(context, inputs)
            return
        task_data = open_task_data(inputs["data"], context.job.config)
        say = context.progress.message
        write_student(task_data, context.job, inputs["teacher"], context.out, say)


def _preprocess_of(job: Job) -> dict[str, Any] | None:
    """The preprocessing of a student that is the teacher's network."""
    own = job.config.teacher.preprocess
    if own is None or job.config.student.model != TEACHERS_OWN:
        return None
    return own.model_dump(mode="json")
