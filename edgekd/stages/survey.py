"""The candidates of a search before anything is trained: measured, or only predicted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import InputError
from edgekd.pipeline.stage import Context, Job
from edgekd.release.student_search import SEARCH
from edgekd.stages.candidates import FOLDER, SECONDS, CandidateSet, measuring_settings
from edgekd.stages.search import rungs_for
from edgekd.stages.task_data import TaskData, open_task_data, read_json, write_json
from edgekd.stages.teacher import WEIGHTS, build_teacher, plan_adaptation, write_adaptation
from edgekd.students.race import epochs_of
from edgekd.students.search import no_candidate


class CandidatesStage:
    """The stage of ``edgekd students``: propose and measure; writes ``search.json``.

    Args:
        inputs: with the teacher where its stage is done or trains nothing; otherwise its network
            is measured with fresh weights.
    """

    name = "candidates"
    libraries = ("torch",)

    def __init__(self, inputs: tuple[str, ...]) -> None:
        self.inputs = inputs

    def config_slice(self, job: Job) -> dict[str, Any]:
        """What the measured figures depend on, and the race's epochs that are planned."""
        return {**measuring_settings(job), "epochs": job.config.distill.epochs}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Propose and measure; the record says what is nearest where nothing is feasible."""
        teacher = inputs.get("teacher")
        if teacher is None:
            task_data = open_task_data(inputs["data"], context.job.config)
            teacher = untrained_teacher(task_data, context.scratch / "untrained")
        candidates = CandidateSet(context, inputs["data"], teacher)
        candidates.propose()
        candidates.measure()
        write_json(context.out / SEARCH, survey_record(candidates, len(candidates.feasible)))


def untrained_teacher(task_data: TaskData, folder: Path) -> Path:
    """A folder such as the stage teacher writes, with fresh weights: enough to be measured."""
    from edgekd.models.weights import save_weights

    folder.mkdir(parents=True, exist_ok=True)
    save_weights(build_teacher(task_data), folder / WEIGHTS)
    write_adaptation(plan_adaptation(task_data, task_data.config.teacher), folder)
    return folder


def predicted_survey(context: Context, data: Path, teacher: Path | None) -> dict[str, Any]:
    """The record of a search whose candidates are only predicted; nothing is measured or trained.

    ``teacher`` is its stage's artifact; None: its network is counted with fresh weights.
    """
    job = context.job
    if teacher is None and job.config.teacher.model is not None:
        task_data = open_task_data(data, job.config)
        teacher = untrained_teacher(task_data, context.scratch / "untrained")
    candidates = CandidateSet(context, data, teacher)
    candidates.propose()
    candidates.limits.check(candidates.model.footprint)
    possible = candidates.predict()
    return survey_record(candidates, min(len(possible), candidates.search.max_candidates))


def survey_record(candidates: CandidateSet, arms: int) -> dict[str, Any]:
    """The record of a search of which so many candidates will be raced, at most.

    Besides the keys of ``search.json``: ``nothing``, the error where no candidate is feasible, and
    ``planned``, the race's rungs and its epochs in total.
    """
    if arms:
        rungs = rungs_for(candidates.job, arms)
        planned = {"rungs": rungs, "epochs": epochs_of(rungs, arms, candidates.search.reduction)}
        return candidates.record({"nothing": None, "planned": {"arms": arms, **planned}})
    error = no_candidate(candidates.entries, candidates.limits, candidates.teacher_figures)
    nothing = {"what": error.what, "where": error.where, "remedy": error.remedy}
    return candidates.record({"nothing": nothing, "planned": None})


def nothing_feasible(record: Mapping[str, Any]) -> InputError | None:
    """The error of a record without a feasible candidate."""
    return InputError(**record["nothing"]) if record.get("nothing") else None


@dataclass(frozen=True)
class ExpectedTime:
    """How long a search may take, in seconds; None: nothing like it was run here yet."""

    measuring: float | None
    racing: float | None


def expected_time(record: Mapping[str, Any], cache: Path) -> ExpectedTime:
    """The time of a search, from what earlier ones in this run folder took.

    Args:
        record: of a survey.
        cache: the run's cache.
    """
    folder, candidates = cache / FOLDER, record["candidates"]
    each, epoch = None, None
    if (folder / SECONDS).is_file():
        each = read_json(folder / SECONDS)["seconds"]
    trained = [read_json(file) for file in folder.glob("*/trained-*.json")]
    if trained:
        epoch = statistics.median(value["seconds"] / value["epochs"] for value in trained)
    waiting = sum(entry["status"] == "proposed" for entry in candidates)
    planned = record.get("planned") or {"arms": 0, "epochs": 0}
    count = min(waiting, planned["arms"])
    measuring = 0.0 if count == 0 else None if each is None else count * each
    return ExpectedTime(measuring, None if epoch is None else planned["epochs"] * epoch)
