"""The search of the stage student: candidates are measured, the feasible ones raced, the best kept.

The result of each training is stored in the run's cache, the race itself in Optuna's storage.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.host import world_size
from edgekd.errors import InputError, StageError
from edgekd.files import json_sha256
from edgekd.pipeline.fingerprint import code_sha256
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.build_student import student_network
from edgekd.stages.candidates import CandidateSet, measuring_settings, section_of, store, stored
from edgekd.stages.distill import training_settings
from edgekd.stages.teacher import open_teacher
from edgekd.stages.training import fit
from edgekd.students.candidates import combinations
from edgekd.students.constraints import Limits
from edgekd.students.costs import Figures
from edgekd.students.race import epochs_of, race, rungs_of
from edgekd.students.race_storage import import_optuna, publish
from edgekd.students.search import (
    Entry,
    no_candidate,
    objective_values,
    propose_assistant,
    take_race,
    why_selected,
)
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    import numpy as np

    from edgekd.models.dict_model import DictModel


def search_settings(job: Job) -> dict[str, Any]:
    """What the choice depends on, for the ``config_slice`` of the stage student."""
    return training_settings(job.config) | measuring_settings(job)


def check_search(job: Job) -> None:
    """Resolve what a search needs before anything is trained.

    Raises:
        InputError: a model's name is unknown, a package is missing, or several processes run.
    """
    from edgekd.models.build import check_model
    from edgekd.students.pruning_plan import torch_pruning

    search = section_of(job)
    if world_size() > 1:
        raise InputError(
            "a search for the student runs in one process, and torchrun started several",
            where="student.search",
            remedy="run 'edgekd run PIPELINE --until student' without torchrun first; all processes"
            " can then train the student that was chosen",
        )
    import_optuna("student.search")
    for candidate in combinations(search.candidates or ()):
        own = job.config.model_copy(update={"student": candidate.student})
        check_model(student_network(own), candidate.where)
        if candidate.student.prune is not None:
            torch_pruning()
    Limits.of(job.budgets, search.margin)


def rungs_for(job: Job, arms: int) -> tuple[int, ...]:
    """The epochs of each rung of a race of so many candidates."""
    search, epochs = section_of(job), job.config.distill.epochs
    return rungs_of(min(search.last_epochs(epochs), epochs), arms, search.reduction)


class StudentRace:
    """Races the feasible candidates by short distillations from the cached teacher."""

    def __init__(self, candidates: CandidateSet, teacher: Path) -> None:
        self.set, self.teacher = candidates, teacher
        self.context, self.config = candidates.context, candidates.config
        self.search, self.task_data = candidates.search, candidates.task_data
        self.say = candidates.say

    def choose(self) -> tuple[Entry, dict[str, Any]]:
        """The winner, and the record's keys about the choice.

        The winner's trained network is measured again and has to hold all limits, else the next
        one is taken.

        Raises:
            InputError: there is no feasible candidate.
            TargetError: the target cannot be reached; all that was found is stored.
        """
        if not self.set.feasible:
            raise self._nothing()
        arms = self._agreed({entry.name: entry for entry in self.set.feasible})
        rungs, reduction = rungs_for(self.context.job, len(arms)), self.search.reduction
        settings = self._training(0)
        definition = [
            [self.set.key(entry.candidate.student, settings) for entry in arms.values()],
            [rungs, reduction, self.search.objectives, self.set.percentile],
        ]
        shown = ", then ".join(map(str, rungs))
        self.say(
            f"  race: {len(arms)} candidates for {shown} epoch(s), "
            f"{epochs_of(rungs, len(arms), reduction)} in total at most"
        )
        if (scheme := self.config.distill.scheme.name) != "offline":
            self.say(f"  the race distills from the teacher; {scheme} is how the winner is trained")
        better = "max" if self.task_data.task.higher_is_better else "min"
        result = race(
            tuple(arms),
            lambda name, epochs: self._train(arms[name], epochs),
            rungs=rungs,
            reduction=reduction,
            storage=self.search.storage or f"sqlite:///{self.set.folder.resolve()}/race.sqlite3",
            study=f"{self.config.name} {json_sha256(definition)[:12]}",
            objectives=[
                (name, "max" if name == "accuracy" and better == "max" else "min")
                for name in self.search.objectives
            ],
            say=self.say,
        )
        take_race(list(arms.values()), result)
        for entry in arms.values():
            file = self._trained(entry, rungs[0]).with_suffix(".json")
            entry.agreement = stored(file)["agreement"] if file.is_file() else None
        order = [arms[name] for name in result.order]
        winner, confirmed = self._confirm(order)
        others = [entry for entry in order if entry is not winner]
        metric = self.task_data.task.metric
        return winner, {
            "winner": winner.name,
            "confirmed": confirmed.to_json(),
            "why": why_selected(winner, others, self.search.objectives[0], metric),
            "assistant": self._assistant(winner),
        }

    def _agreed(self, mine: dict[str, Entry]) -> dict[str, Entry]:
        """The arms that all workers of a shared storage race: those of the first of them.

        Each measures for itself, and near a limit the results may differ.
        """
        if self.search.storage is None:
            return mine
        entries = {entry.name: entry for entry in self.set.entries}
        keys = [self.set.key(entry.candidate.student, {}) for entry in entries.values()]
        study = f"{self.config.name} {json_sha256([keys, self.set.limits.to_json()])[:12]} feasible"
        names = publish(list(mine), self.search.storage, study)
        if other := sorted(set(names) ^ set(mine)):
            self.say(f"  as another worker measured them: {', '.join(other)}")
        return {name: entries[name] for name in names}

    def _training(self, epochs: int) -> dict[str, Any]:
        """What a training of so many epochs depends on, besides the network and the teacher."""
        settings = training_settings(self.config)
        distill = {**settings["distill"], "epochs": epochs, "baseline": None, "scheme": None}
        return settings | {"distill": distill, "training": code_sha256(("edgekd.stages.training",))}

    def _trained(self, entry: Entry, epochs: int) -> Path:
        """Where the weights of a candidate after so many epochs are stored."""
        key = self.set.key(entry.candidate.student, self._training(epochs))
        return self.set.place(entry) / f"trained-{epochs}-{key[:12]}.safetensors"

    def _train(self, entry: Entry, epochs: int) -> dict[str, float]:
        """Distill the teacher into a candidate for so many epochs, unless that was done.

        Returns:
            The value of each objective.
        """
        from edgekd.distill.objective import Objective
        from edgekd.models.weights import save_weights

        weights = self._trained(entry, epochs)
        file = weights.with_suffix(".json")
        if not file.is_file():
            distill = self.config.distill.model_copy(update={"epochs": epochs})
            terms, task = self.config.recipes[0], self.task_data.task
            objective = Objective(terms, task, distill.label_smoothing)
            needed = objective.needs_teacher
            teacher = open_teacher(self.teacher, self.task_data) if needed else None
            model, started = self.set.first(entry), time.monotonic()
            scratch = self.context.scratch / f"race-{weights.parent.name}"
            context = replace(self.context, scratch=scratch)
            label = f"{entry.name} {epochs}".replace("/", "-")[:120]
            history = fit(self.task_data, model, objective, distill, label, context, teacher)
            save_weights(model, weights)
            result = {
                "validation": history.best.validation,
                "agreement": self._agreement(model),
                "epochs": epochs,
                "seconds": time.monotonic() - started,
            }
            store(file, result)
            shutil.rmtree(scratch, ignore_errors=True)
        assert entry.figures is not None
        validation = stored(file)["validation"]
        names, percentile = self.search.objectives, self.set.percentile
        return objective_values(names, validation, entry.figures, percentile)

    @cached_property
    def _answers(self) -> list[Mapping[str, np.ndarray[Any, Any]]]:
        """The teacher's predictions for each validation batch, as targets."""
        teacher, task = open_teacher(self.teacher, self.task_data), self.task_data.task
        batches = self.task_data.validation_loader().ordered()
        return [task.pseudo_targets(_arrays(teacher.predict(batch))) for batch in batches]

    def _agreement(self, model: DictModel) -> float:
        """The task's metric with the teacher's predictions as targets, on validation samples."""
        import numpy as np
        import torch

        from edgekd.distill.distributed import training_device

        device, scores = training_device(), []
        model.to(device).eval()
        batches = self.task_data.validation_loader().ordered()
        with torch.inference_mode():
            for batch, targets in zip(batches, self._answers, strict=True):
                outputs = model({name: each.to(device) for name, each in batch.items()})
                scores.append(self.task_data.task.scores(_arrays(outputs), targets))
        return float(np.concatenate(scores).mean())

    def _confirm(self, order: Sequence[Entry]) -> tuple[Entry, Figures]:
        """The first in the race's order whose trained network holds all limits when measured."""
        for entry in order:
            if entry.status == "failed" or not entry.rungs:
                continue
            epochs = entry.rungs[-1].epochs
            weights = self._trained(entry, epochs)
            if not weights.is_file():  # Another worker trained it.
                self._train(entry, epochs)
            outcome = self.set.measured(entry, weights)
            if outcome.feasible and outcome.figures is not None:
                entry.reject("winner", "")
                return entry, outcome.figures
            entry.figures = outcome.figures or entry.figures
            entry.reject("infeasible", f"measured again after the race: {outcome.reason}")
            self.say(f"  {entry.name}: {entry.reason}")
        failed = [entry for entry in order if entry.status == "failed"]
        if len(failed) == len(order):
            reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in failed[:3])
            raise StageError(
                f"none of {len(order)} feasible candidates could be trained: {reasons}",
                where="student.search",
                remedy="a loss that names layers (distill.losses) needs candidates that have them",
            )
        raise self._nothing()

    def _nothing(self) -> InputError:
        return no_candidate(self.set.entries, self.set.limits, self.set.teacher_figures)

    def _assistant(self, winner: Entry) -> dict[str, Any] | None:
        costs, task = self.set.teacher_costs, self.task_data.task
        if costs is None or not isinstance(task, Classification):
            return None
        return propose_assistant(winner, self.set.entries, costs, task.higher_is_better)


def run_search(context: Context, inputs: Mapping[str, Path]) -> None:
    """Search for the student and write it as the stage's artifact.

    Raises:
        InputError: no candidate is feasible; the nearest budgets are named.
        TargetError: the target cannot be reached; a later run resumes.
    """
    candidates = CandidateSet(context, inputs["data"], inputs["teacher"])
    candidates.propose()
    candidates.measure()
    winner, about = StudentRace(candidates, inputs["teacher"]).choose()
    candidates.write(winner, about)
    candidates.say(f"  {about['why']}")
    if about["assistant"] is not None:
        candidates.say(f"  {about['assistant']['text']}")


def _arrays(outputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}
