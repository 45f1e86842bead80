"""The search of the stage student: candidates are measured, the feasible ones raced, the best kept.

Everything is stored as it is found, so that a search that is stopped resumes: a candidate's network
and costs, its measurements, and the result of each training, in the run's cache; the race itself
in Optuna's storage.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.host import world_size
from edgekd.config.networks import TEACHERS_OWN, StudentConfig
from edgekd.config.search import SearchConfig
from edgekd.errors import CrashError, EdgekdError, InputError, StageError
from edgekd.files import file_sha256, json_sha256
from edgekd.pipeline.fingerprint import (
    code_sha256,
    extension_versions,
    library_versions,
    references_sha256,
)
from edgekd.pipeline.stage import Context, Job
from edgekd.release.student_search import SEARCH, latency_percentile
from edgekd.stages.build_student import (
    FIRST_WEIGHTS,
    SECTION,
    build_student,
    with_student,
    write_student,
)
from edgekd.stages.distill import training_settings
from edgekd.stages.engine_builders import precisions_of
from edgekd.stages.measure_candidate import (
    CandidateMeasurement,
    measure_candidate,
    measure_footprint,
)
from edgekd.stages.task_data import TaskData, open_task_data, read_json, write_json
from edgekd.stages.teacher import (
    BLACK_BOX,
    WEIGHTS,
    build_teacher,
    open_network,
    open_teacher,
    plan_adaptation,
    read_adaptation,
    write_adaptation,
)
from edgekd.stages.training import fit, hub_fingerprint
from edgekd.students.candidates import propose
from edgekd.students.constraints import Limits
from edgekd.students.costs import CostModel, Figures, GraphCosts, graph_costs
from edgekd.students.race import epochs_of, race, rungs_of
from edgekd.students.search import (
    Entry,
    measure_in_turn,
    no_candidate,
    objective_values,
    predict_all,
    propose_assistant,
    search_record,
    take_race,
    why_selected,
)
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    import numpy as np

    from edgekd.models.dict_model import DictModel

POOL = 2
"""So many times ``max_candidates`` are predicted, of which the promising ones are measured."""

_ARTIFACT, _COSTS = "artifact", "costs.json"
_CHOICE_BUDGETS = ("size.", "parameters.", "latency.", "memory.")


def search_settings(job: Job) -> dict[str, Any]:
    """What the choice depends on, for the ``config_slice`` of the stage student."""
    config, search = job.config, section_of(job)
    sources = search.candidates or ()
    files = [source.checkpoint for source in sources if source.checkpoint is not None]
    return {
        **training_settings(config),
        **measuring_settings(job),
        "search": search.model_dump(mode="json", exclude={"storage"}),
        "checkpoints": {
            name: file_sha256(job.existing_file(name, "student.search.candidates"))
            for name in files
        },
        "hubs": [hub_fingerprint(name) for name in {source.model for source in sources}],
        "libraries": library_versions(("optuna", "torch-pruning", "onnxruntime")),
    }


def measuring_settings(job: Job) -> dict[str, Any]:
    """What candidates and their measured figures depend on."""
    config = job.config
    preprocess = config.teacher.preprocess
    return {
        "teacher": config.teacher.model_dump(mode="json", include={"model", "args"}),
        "preprocess": preprocess and preprocess.model_dump(mode="json"),
        "seed": config.seed,
        "task": job.task_settings,
        "opset": config.export.opset,
        "quantize": config.quantize and config.quantize.model_dump(mode="json", exclude={"qat"}),
        "engines": [engine.model_dump(mode="json") for engine in config.engines[:1]],
        "batch_size": config.benchmark.batch_size,
        "profile": job.profile.model_dump(mode="json", exclude={"budget"}),
        "budgets": {
            key: [value, job.budgets.origin(key)]
            for key, value in job.budgets.given.items()
            if key.startswith(_CHOICE_BUDGETS)
        },
        "target": config.target,
        "machine": machine(),
    }


def machine() -> list[str]:
    """This machine, whose figures are not valid on another one."""
    import platform

    return [platform.node(), platform.machine()]


def section_of(job: Job) -> SearchConfig:
    """The section ``student.search``, of a pipeline that has one."""
    assert job.config.student.search is not None
    return job.config.student.search


def check_search(job: Job) -> None:
    """Resolve what a search needs before anything is trained.

    Raises:
        InputError: a model's name is unknown, a package is missing, or several processes run.
    """
    from edgekd.config.networks import ModelConfig
    from edgekd.models.build import check_model
    from edgekd.students.pruning_plan import torch_pruning
    from edgekd.students.race import check_optuna

    search = section_of(job)
    if world_size() > 1:
        raise InputError(
            "a search for the student runs in one process, and torchrun started several",
            where="student.search",
            remedy="run 'edgekd run PIPELINE --until student' without torchrun first; the training "
            "of the chosen student can then use all of them",
        )
    check_optuna("student.search")
    for index, source in enumerate(search.candidates or ()):
        if source.model not in (None, TEACHERS_OWN):
            first = {key: values[0] for key, values in source.grid.items()}
            model = ModelConfig(model=source.model, args={**source.args, **first})
            check_model(model, f"student.search.candidates[{index}]")
    if any(source.prune is not None for source in search.candidates or ()):
        torch_pruning()
    Limits.of(job.budgets, search.margin)


def untrained_teacher(task_data: TaskData, folder: Path) -> Path:
    """A folder such as the stage teacher writes, with fresh weights: enough to be measured."""
    from edgekd.models.weights import save_weights

    folder.mkdir(parents=True, exist_ok=True)
    save_weights(build_teacher(task_data), folder / WEIGHTS)
    write_adaptation(plan_adaptation(task_data, task_data.config.teacher), folder)
    return folder


class StudentSearch:
    """Proposes, predicts, measures and races candidates.

    Args:
        context: of the running stage.
        data: the data stage's artifact.
        teacher: that of the teacher stage, or of :func:`untrained_teacher`; None for an ONNX file
            that was not opened yet.

    Attributes:
        entries: the candidates, with what is known of them.
        model: predicts their figures.
        limits: the budgets that they have to hold.
    """

    def __init__(self, context: Context, data: Path, teacher: Path | None) -> None:
        self.context, self.job, self.config = context, context.job, context.job.config
        self.search = section_of(context.job)
        self.task_data = open_task_data(data, self.config)
        self.teacher = teacher
        self.limits = Limits.of(self.job.budgets, self.search.margin)
        self.percentile = latency_percentile(self.limits.values)
        self.say = context.progress.message
        self.folder = context.cache / "search"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[Entry] = []
        self.model = self._cost_model(None)

    def _cost_model(self, footprint: Any) -> CostModel:
        runtime = self.job.profile.runtime
        first = self.config.engines[0]
        threads = getattr(first, "threads", None) or runtime.threads or 1
        return CostModel(self.job.profile, precisions_of(self.job), threads, footprint)

    # Proposing and predicting

    def propose(self) -> None:
        """Propose the candidates, build each network, and count its costs."""
        network = None
        if self.teacher is not None and (self.teacher / WEIGHTS).is_file():
            network = open_network(self.teacher, self.task_data)
        wanted = self.search.model_copy(
            update={"max_candidates": POOL * self.search.max_candidates}
        )
        spec = self.task_data.spec
        candidates = propose(
            wanted, self.config.teacher, network, spec.inputs, spec.outputs, self.say
        )
        self.entries = [Entry(candidate) for candidate in candidates]
        self.context.progress.start("candidates", len(self.entries), "network")
        try:
            for entry in self.entries:
                self._prepare(entry)
                self.context.progress.advance()
        finally:
            self.context.progress.finish()
        for entry in self.entries:
            if entry.status == "failed":
                self.say(f"  {entry.name}: {entry.reason}")
        if all(entry.status == "failed" for entry in self.entries):
            raise no_candidate(self.entries, self.limits)

    def predict(self) -> list[Entry]:
        """Predict the candidates that were not measured; those that may be feasible."""
        return predict_all(self.entries, self.model, self.limits, self.teacher_figures)

    def _prepare(self, entry: Entry) -> None:
        """Write a candidate's network and count its costs, unless that was done."""
        folder = self._folder(entry)
        try:
            if not (folder / _COSTS).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                (partial / _ARTIFACT).mkdir(parents=True)
                own = with_student(self.task_data, entry.candidate.student)
                teacher = self.teacher or partial
                model, _ = write_student(
                    own, self.job, teacher, partial / _ARTIFACT, lambda text: None
                )
                write_json(partial / _COSTS, asdict(self._count(model)))
                partial.rename(folder)
            entry.costs = _read_costs(folder / _COSTS)
        except (InputError, StageError, CrashError) as error:
            entry.reject("failed", _short(error))

    def _count(self, model: DictModel) -> GraphCosts:
        from edgekd.onnx.export import export_onnx

        file = self.context.scratch / "counted.onnx"
        export_onnx(model, file, self.config.export.opset)
        costs = graph_costs(file, self.config.benchmark.batch_size)
        file.unlink()
        return costs

    def _folder(self, entry: Entry) -> Path:
        return self.folder / self._key(entry.candidate.student, {})[:16]

    def _key(self, student: StudentConfig, more: Mapping[str, Any]) -> str:
        """Identifies what depends on a candidate's section, the teacher and the data."""
        section = student.model_dump(mode="json", exclude_defaults=True)
        if student.checkpoint is not None:
            path = self.job.existing_file(student.checkpoint, "student.search.candidates")
            section["checkpoint"] = file_sha256(path)
        named = [section, self._common["teacher"], self._common["task"]]
        return json_sha256(
            {
                **self._common,
                **more,
                "section": section,
                "references": references_sha256(named),
                "extensions": extension_versions(named),
            }
        )

    @cached_property
    def _common(self) -> dict[str, Any]:
        teacher = self.config.teacher
        files = sorted(self.teacher.iterdir()) if self.teacher is not None else []
        return {
            "data": self.task_data.digest,
            "weights": {
                file.name: file_sha256(file)
                for file in files
                if file.suffix in (".safetensors", ".onnx")
            },
            "teacher": teacher.model_dump(mode="json", exclude={"train", "checkpoint", "onnx"}),
            "task": self.job.task_settings,
            "seed": self.config.seed,
            "opset": self.config.export.opset,
            "batch_size": self.config.benchmark.batch_size,
            "code": code_sha256(("edgekd.stages.build_student", "edgekd.students.costs")),
            "libraries": library_versions(("torch", "torch-pruning", "onnxscript")),
        }

    # The teacher, for limits that are ratios to it

    @cached_property
    def teacher_file(self) -> Path | None:
        """The teacher as float32 ONNX file; None where there is none yet."""
        from edgekd.onnx.export import export_onnx
        from edgekd.onnx.import_onnx import adapt_onnx

        file = self.context.scratch / "teacher.onnx"
        if self.teacher is None:
            return None
        if (self.teacher / BLACK_BOX).is_file():
            shutil.copyfile(self.teacher / BLACK_BOX, file)
            adaptation = read_adaptation(self.teacher, self.task_data)
            adapt_onnx(file, adaptation, self.task_data.spec)
        else:
            network = open_network(self.teacher, self.task_data)
            export_onnx(network, file, self.config.export.opset)
        return file

    @cached_property
    def teacher_costs(self) -> GraphCosts | None:
        """The teacher's costs, stored for the next time."""
        if self.teacher is None:
            return None
        stored = self.folder / f"teacher-{json_sha256(self._common)[:16]}.json"
        if not stored.is_file():
            assert self.teacher_file is not None
            costs = graph_costs(self.teacher_file, self.config.benchmark.batch_size)
            write_json(stored, asdict(costs) | {"bytes": self.teacher_file.stat().st_size})
        return _read_costs(stored)

    @property
    def teacher_figures(self) -> Figures | None:
        """The teacher's size and parameters, and its predicted latency; its speed relative to a
        candidate is measured with that one."""
        costs = self.teacher_costs
        if costs is None:
            return None
        predicted = self.model.predict(costs)
        size = costs.weights_bytes / 1e6
        return Figures(predicted.latency_ms, None, size, costs.parameters, "float32", 0)

    # Measuring

    def measure(self) -> None:
        """Measure the candidates that may be feasible, ``max_candidates`` at most.

        Raises:
            InputError: a limit is below what the runtime itself needs.
            TargetError: the target cannot be reached; what was measured is stored.
        """
        footprint = measure_footprint(self.context, self.task_data)
        self.limits.check(footprint)
        self.model = self._cost_model(footprint)
        started, before = time.monotonic(), sum(entry.figures is not None for entry in self.entries)
        fresh = 0

        def measured(entry: Entry) -> CandidateMeasurement:
            nonlocal fresh
            outcome = self._measured(entry, self._first(entry))
            fresh += outcome.measured > 0
            return outcome

        measure_in_turn(
            self.entries,
            self.model,
            self.limits,
            measured,
            most=self.search.max_candidates,
            several=len(self.search.objectives) > 1,
            teacher=self.teacher_figures,
            say=self.say,
        )
        if fresh:
            seconds = (time.monotonic() - started) / fresh
            write_json(self.folder / "seconds.json", {"measuring": seconds})
        count = sum(entry.figures is not None for entry in self.entries) - before
        self.say(f"  {count} candidates measured, {len(self.feasible)} hold all limits")

    def _measured(self, entry: Entry, model: DictModel) -> CandidateMeasurement:
        return measure_candidate(
            self.context,
            self.task_data,
            model,
            self.teacher_file if "latency.min_speedup" in self.limits.values else None,
            limits=self.limits,
            teacher_figures=self.teacher_figures,
        )

    @property
    def feasible(self) -> list[Entry]:
        """The measured candidates that hold all limits, the largest first."""
        found = [entry for entry in self.entries if entry.status == "feasible"]
        return sorted(found, key=lambda entry: -(entry.costs.macs if entry.costs else 0))

    def _first(self, entry: Entry) -> DictModel:
        """A candidate's network with its initial weights."""
        return self._load(entry, self._folder(entry) / _ARTIFACT / FIRST_WEIGHTS)

    def _load(self, entry: Entry, weights: Path) -> DictModel:
        from edgekd.models.weights import load_weights

        own = with_student(self.task_data, entry.candidate.student)
        model = build_student(own, self._folder(entry) / _ARTIFACT)
        load_weights(model, weights, where=f"candidate {entry.name}")
        return model

    # The race

    def choose(self) -> tuple[Entry, dict[str, Any]]:
        """Race the feasible candidates; the winner, and the record's keys about the choice.

        The winner's trained network is measured again and has to hold all limits, else the next
        one is taken.

        Raises:
            InputError: there is no feasible candidate.
            TargetError: the target cannot be reached; all that was found is stored.
        """
        if not self.feasible:
            raise no_candidate(self.entries, self.limits, self.teacher_figures)
        arms = self._agreed({entry.name: entry for entry in self.feasible})
        rungs = self.rungs(len(arms))
        settings = training_settings(self.config) | {"student": None}
        definition = [
            [self._key(entry.candidate.student, {}) for entry in arms.values()],
            [rungs, self.search.reduction, self.search.objectives, self.percentile],
            [settings, self._training_code],
        ]
        total = epochs_of(rungs, len(arms), self.search.reduction)
        self.say(
            f"  race: {len(arms)} candidates over {', '.join(map(str, rungs))} epochs, "
            f"{total} epochs at most"
        )
        if self.config.distill.scheme.name != "offline":
            self.say(
                f"  the race distills from the teacher itself; scheme "
                f"{self.config.distill.scheme.name} is for the winner's training"
            )
        better = "max" if self.task_data.task.higher_is_better else "min"
        result = race(
            tuple(arms),
            lambda name, epochs: self._train(arms[name], epochs),
            rungs=rungs,
            reduction=self.search.reduction,
            storage=self.search.storage or f"sqlite:///{self.folder.resolve() / 'race.sqlite3'}",
            study=f"{self.config.name} {json_sha256(definition)[:12]}",
            objectives=[
                (name, better if name == "accuracy" else "min") for name in self.search.objectives
            ],
            say=self.say,
        )
        take_race(list(arms.values()), result)
        for entry in arms.values():
            stored = self._trained(entry, rungs[0]).with_suffix(".json")
            entry.agreement = read_json(stored)["agreement"] if stored.is_file() else None
        winner, confirmed = self._confirm([arms[name] for name in result.order])
        others = [arms[name] for name in result.order if name != winner.name]
        return winner, {
            "winner": winner.name,
            "confirmed": confirmed.to_json(),
            "why": why_selected(
                winner, others, self.search.objectives[0], self.task_data.task.metric
            ),
            "assistant": self._assistant(winner),
        }

    def rungs(self, arms: int) -> tuple[int, ...]:
        """The epochs of each rung of a race of so many candidates."""
        last = min(
            self.search.last_epochs(self.config.distill.epochs), self.config.distill.epochs
        )
        return rungs_of(last, arms, self.search.reduction)

    def _agreed(self, mine: dict[str, Entry]) -> dict[str, Entry]:
        """The arms that all workers of a shared storage race: those of the first of them.

        Each measures for itself, and near a limit the results may differ.
        """
        if self.search.storage is None:
            return mine
        from edgekd.students.race import publish

        own = json_sha256([self._common, sorted(entry.name for entry in self.entries)])[:12]
        names = publish(
            self.search.storage, f"{self.config.name} {own} candidates", list(mine), self.say
        )
        entries = {entry.name: entry for entry in self.entries}
        if only := [name for name in names if name not in mine]:
            self.say(f"  another worker found {', '.join(only)} feasible too")
        return {name: entries[name] for name in names if name in entries}

    @cached_property
    def _training_code(self) -> str:
        return code_sha256(("edgekd.stages.training", "edgekd.stages.distill"))

    def _trained(self, entry: Entry, epochs: int) -> Path:
        """Where the weights of a candidate after so many epochs are stored."""
        settings = training_settings(self.config) | {"student": None}
        settings["distill"] = {**settings["distill"], "epochs": epochs}
        settings["distill"].update(baseline=None, scheme=None)
        key = self._key(
            entry.candidate.student,
            {"settings": settings, "own": references_sha256(settings), "code2": self._training_code},
        )
        return self._folder(entry) / f"trained-{epochs}-{key[:12]}.safetensors"

    def _train(self, entry: Entry, epochs: int) -> dict[str, float]:
        """Distill the teacher into a candidate for so many epochs, unless that was done.

        Returns:
            The value of each objective.
        """
        from edgekd.distill.objective import Objective
        from edgekd.models.weights import save_weights

        weights = self._trained(entry, epochs)
        stored = weights.with_suffix(".json")
        if not stored.is_file():
            assert self.teacher is not None
            distill = self.config.distill.model_copy(update={"epochs": epochs})
            model = self._first(entry)
            objective = Objective(
                self.config.loss_terms, self.task_data.task, distill.label_smoothing
            )
            teacher = (
                open_teacher(self.teacher, self.task_data) if objective.needs_teacher else None
            )
            started = time.monotonic()
            label = f"{entry.name}, {epochs} epochs"
            slot = f"race-{self.entries.index(entry)}-{epochs}"
            history = fit(
                self.task_data, model, objective, distill, label,
                replace(self.context, scratch=self.context.scratch / slot), teacher,
            )  # fmt: skip
            save_weights(model, weights)
            write_json(
                stored,
                {
                    "validation": history.best.validation,
                    "agreement": self._agreement(model),
                    "seconds": time.monotonic() - started,
                    "epochs": epochs,
                },
            )
            shutil.rmtree(self.context.scratch / slot, ignore_errors=True)
        assert entry.figures is not None
        return objective_values(
            self.search.objectives, read_json(stored)["validation"], entry.figures, self.percentile
        )

    @cached_property
    def _teachers_answers(self) -> list[Mapping[str, np.ndarray[Any, Any]]]:
        """The teacher's predictions for each validation batch, as targets."""
        assert self.teacher is not None
        teacher, task = open_teacher(self.teacher, self.task_data), self.task_data.task
        return [
            task.pseudo_targets(_arrays(teacher.predict(batch)))
            for batch in self.task_data.validation_loader().ordered()
        ]

    def _agreement(self, model: DictModel) -> float:
        """The task's metric with the teacher's predictions as targets, on validation samples."""
        import numpy as np
        import torch

        from edgekd.distill.distributed import training_device

        device, scores = training_device(), []
        model.to(device).eval()
        batches = self.task_data.validation_loader().ordered()
        with torch.inference_mode():
            for batch, targets in zip(batches, self._teachers_answers, strict=True):
                outputs = model({name: each.to(device) for name, each in batch.items()})
                scores.append(self.task_data.task.scores(_arrays(outputs), targets))
        return float(np.concatenate(scores).mean())

    def _confirm(self, order: Sequence[Entry]) -> tuple[Entry, Figures]:
        """The first in the race's order whose trained network holds all limits when measured."""
        for entry in order:
            if entry.status == "failed" or not entry.rungs:
                continue
            weights = self._trained(entry, entry.rungs[-1].epochs)
            if not weights.is_file():  # Another worker trained it.
                self._train(entry, entry.rungs[-1].epochs)
            outcome = self._measured(entry, self._load(entry, weights))
            if outcome.feasible:
                assert outcome.figures is not None
                entry.reject("winner", "")
                return entry, outcome.figures
            entry.figures = outcome.figures or entry.figures
            entry.reject("infeasible", f"measured again after training: {outcome.reason}")
            self.say(f"  {entry.name}: {entry.reason}")
        failed = [entry for entry in order if entry.status == "failed"]
        if len(failed) == len(order):
            reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in failed[:3])
            raise StageError(
                f"none of {len(order)} feasible candidates could be trained: {reasons}",
                where="student.search",
                remedy="a loss that names layers needs candidates that have them; see distill.losses",
            )
        raise no_candidate(self.entries, self.limits, self.teacher_figures)

    def _assistant(self, winner: Entry) -> dict[str, Any] | None:
        costs, task = self.teacher_costs, self.task_data.task
        if costs is None or not isinstance(task, Classification):
            return None
        return propose_assistant(winner, self.entries, costs, task.higher_is_better)

    # What is recorded

    def record(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The content of ``search.json``."""
        task = self.task_data.task
        general = {
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "objectives": list(self.search.objectives),
        }
        return search_record(self.entries, self.limits, self.model, general | dict(about))

    def write(self, winner: Entry, about: Mapping[str, Any], out: Path) -> None:
        """Write the student's artifact: that of the winner, its section, and the record."""
        shutil.copytree(self._folder(winner) / _ARTIFACT, out, dirs_exist_ok=True)
        section = winner.candidate.student.model_dump(mode="json", exclude_defaults=True)
        write_json(out / SECTION, section)
        write_json(out / SEARCH, self.record(about))


def run_search(context: Context, inputs: Mapping[str, Path]) -> None:
    """Search for the student and write it as the stage's artifact.

    Raises:
        InputError: no candidate is feasible; the nearest budgets are named.
        TargetError: the target cannot be reached; a later run resumes.
    """
    search = StudentSearch(context, inputs["data"], inputs["teacher"])
    search.propose()
    search.measure()
    winner, about = search.choose()
    search.write(winner, about, context.out)
    say = context.progress.message
    say(f"  {about['why']}")
    if about["assistant"] is not None:
        say(f"  {about['assistant']['text']}")


class CandidatesStage:
    """The stage of ``edgekd students``: propose and measure; writes ``search.json``.

    ``inputs`` includes the teacher where its stage is done or trains nothing; otherwise its
    network is measured with fresh weights.
    """

    name = "candidates"
    libraries = ("torch",)

    def __init__(self, inputs: tuple[str, ...]) -> None:
        self.inputs = inputs

    def config_slice(self, job: Job) -> dict[str, Any]:
        """What the measured figures depend on."""
        return {**search_settings(job), "trained": self.inputs}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Propose and measure; a record without a feasible candidate says what is nearest."""
        teacher = inputs.get("teacher")
        if teacher is None:
            task_data = open_task_data(inputs["data"], context.job.config)
            teacher = untrained_teacher(task_data, context.scratch / "untrained")
        search = StudentSearch(context, inputs["data"], teacher)
        search.propose()
        search.measure()
        nothing = None
        if not search.feasible:
            error = no_candidate(search.entries, search.limits, search.teacher_figures)
            nothing = {"what": error.what, "where": error.where, "remedy": error.remedy}
        rungs = search.rungs(max(1, len(search.feasible)))
        write_json(context.out / SEARCH, search.record({"nothing": nothing, "planned": rungs}))


def _read_costs(path: Path) -> GraphCosts:
    value = read_json(path)
    value.pop("bytes", None)
    return GraphCosts(**{**value, "operators": tuple(value["operators"])})


def _arrays(outputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}


def _short(error: EdgekdError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what


def seconds_per_epoch(folder: Path) -> float | None:
    """The median time of an epoch among the race's trainings stored in a run's cache; None: none
    is."""
    import statistics

    each = [
        value["seconds"] / value["epochs"]
        for file in _files(folder)
        if (value := read_json(file))
    ]
    return statistics.median(each) if each else None


def _files(folder: Path) -> Iterable[Path]:
    return (folder / "search").glob("*/trained-*.json")
