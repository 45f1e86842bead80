"""What is known of a job before it runs: from its file, this machine and its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.config.host import local_providers, saturates
from edgekd.data.dataset import SCHEMA as DATASET_SCHEMA
from edgekd.pipeline.runner import PlanRow
from edgekd.pipeline.stage import Job
from edgekd.release.result import Result, read_result
from edgekd.release.student_search import SCHEMA as SEARCH_SCHEMA
from edgekd.release.student_search import SEARCH
from edgekd.stages.task_data import CHOICE_SCHEMA, STUDENT_SCHEMA, VALIDATION_SCHEMA, read_json
from edgekd.stages.teacher import WEIGHTS
from edgekd.students.advice_facts import Facts, Known
from edgekd.tasks import get_task
from edgerun.tensorrt.library import is_installed


def read_facts(
    job: Job,
    content: Mapping[str, Any],
    original: Mapping[str, Any],
    wished: Sequence[str],
    rows: Sequence[PlanRow],
    objectives: Sequence[str] | None = None,
) -> Facts:
    """The facts of a job.

    Args:
        job: with the goal and the requirements.
        content: the same as it is written.
        original: the file without them.
        wished: the keys that the goal and the requirements set.
        rows: the plan of the job without them: only artifacts that are up to date count.
        objectives: of the search that the goal asks for; None: it asks for none.

    Raises:
        InputError: the task is unknown, or a result is damaged.
    """
    task = get_task(job.config.task, job.config.task_args)
    artifacts = {row.stage: row.artifact.folder for row in rows if row.artifact is not None}
    found: dict[str, Any] = {}
    if data := artifacts.get("data"):
        stored = read_json(data / "dataset.json", DATASET_SCHEMA)
        found["inputs"] = tuple(tuple(spec["shape"][1:]) for spec in stored["inputs"])
        found["samples"] = stored["samples"].get("train")
        found["classes"] = len(stored["labels"]) if stored.get("labels") else None
    if teacher := artifacts.get("teacher"):
        file = teacher / "validation.json"
        checked = read_json(file, VALIDATION_SCHEMA)
        if checked.get(task.metric) is not None:
            found["teacher_score"] = Known(checked[task.metric], _shown(file))
        if checked.get("entropy") is not None:
            found["teacher_entropy"] = Known(checked["entropy"], _shown(file))
        if (teacher / WEIGHTS).is_file():
            found["teacher_parameters"] = _parameters(teacher / WEIGHTS)
    elif (weights := job.config.teacher.checkpoint) and weights.endswith(".safetensors"):
        path = job.path(weights)
        if path.is_file():
            found["teacher_parameters"] = _parameters(path)
    if student := artifacts.get("student"):
        file = student / "model.json"
        found["student_parameters"] = Known(
            read_json(file, STUDENT_SCHEMA)["parameters"], _shown(file)
        )
        if (student / SEARCH).is_file():
            record = student / SEARCH
            found |= {"searched": read_json(record, SEARCH_SCHEMA), "searched_file": _shown(record)}
    if benchmark := artifacts.get("benchmark"):
        file = benchmark / "result.json"
        result: Result = read_result(file)
        found |= {"result": result, "result_file": _shown(file)}
        choice = artifacts["engines"] / "choice.json"
        if choice.is_file():
            found |= {"choice": read_json(choice, CHOICE_SCHEMA), "choice_file": _shown(choice)}
    return Facts(
        config=job.config,
        content=content,
        original=original,
        profile=job.profile,
        wished=frozenset(wished),
        objectives=tuple(objectives) if objectives else None,
        providers=local_providers(),
        saturates=saturates(),
        rtx_installed=is_installed("tensorrt-rtx"),
        higher_is_better=task.higher_is_better,
        metric=task.metric,
        **found,
    )


def _shown(file: Path) -> str:
    return file.as_posix()


def _parameters(weights: Path) -> Known:
    """The number of parameters in a safetensors file; statistics of batch norms are none."""
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as tensors:
        total = sum(
            math.prod(tensors.get_slice(name).get_shape())
            for name in tensors.keys()  # noqa: SIM118 - it is no mapping
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        )
    return Known(float(total), _shown(weights))
