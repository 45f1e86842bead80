"""The candidates of a search: their networks are built, counted, predicted, and measured.

Everything is stored in the run's cache as it is found, so that a search that is stopped resumes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.networks import TEACHERS_OWN, StudentConfig
from edgekd.config.pipeline import QuantizeConfig
from edgekd.config.search import SearchConfig
from edgekd.engines.builder import Precision
from edgekd.errors import EdgekdError, InputError, StageError
from edgekd.files import atomic_write, file_sha256, json_sha256, write_whole
from edgekd.pipeline.fingerprint import (
    code_sha256,
    extension_versions,
    library_versions,
    references_sha256,
)
from edgekd.pipeline.stage import Context, Job
from edgekd.release.student_search import SCHEMA, SEARCH, latency_percentile
from edgekd.stages.build_student import (
    FIRST_WEIGHTS,
    SECTION,
    SECTION_SCHEMA,
    build_student,
    with_student,
    write_student,
)
from edgekd.stages.measure_candidate import (
    CandidateMeasurement,
    export_candidate,
    measure_candidate,
    measure_footprint,
)
from edgekd.stages.task_data import open_task_data, write_json
from edgekd.stages.teacher import BLACK_BOX, WEIGHTS, open_network, read_adaptation
from edgekd.stages.training import hub_fingerprint
from edgekd.students.candidates import propose
from edgekd.students.constraints import Limits
from edgekd.students.cost_model import CostModel
from edgekd.students.costs import Figures, Footprint, GraphCosts, graph_costs
from edgekd.students.search import Entry, measure_in_turn, no_candidate, predict_all, search_record

if TYPE_CHECKING:
    from edgekd.models.dict_model import DictModel

POOL = 2
"""So many times ``max_candidates`` are predicted, of which the promising ones are measured."""
FOLDER, SECONDS = "search", "seconds.json"
"""In the run's cache: the folder of searches, and in it how long measuring took."""

_ARTIFACT, _COSTS = "artifact", "costs.json"
_WHERE = "student.search.candidates"
_RATIOS = {"size.min_ratio", "parameters.max_ratio", "latency.min_speedup"}
_LIMITS = ("size.", "parameters.", "latency.", "memory.")


def store(path: Path, value: Mapping[str, Any]) -> None:
    """Write what a search found into its cache, completely or not at all."""
    write_whole(path, json.dumps(value))


def stored(path: Path) -> dict[str, Any]:
    """What :func:`store` wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def section_of(job: Job) -> SearchConfig:
    """The section ``student.search``, of a pipeline that has one."""
    assert job.config.student.search is not None
    return job.config.student.search


def measuring_settings(job: Job) -> dict[str, Any]:
    """What candidates and their measured figures depend on, for a ``config_slice``."""
    from edgekd.targets import machine_of

    config, search = job.config, section_of(job)
    preprocess, quantize = config.teacher.preprocess, config.quantize
    sources = search.candidates or ()
    files = {source.checkpoint for source in sources if source.checkpoint is not None}
    budgets = job.budgets
    return {
        "search": search.model_dump(mode="json", exclude={"storage"}),
        "checkpoints": {name: file_sha256(job.existing_file(name, _WHERE)) for name in files},
        "hubs": [hub_fingerprint(source.model) for source in sources],
        "teacher": config.teacher.model_dump(mode="json", include={"model", "args"}),
        "preprocess": preprocess and preprocess.model_dump(mode="json"),
        "seed": config.seed,
        "task": job.task_settings,
        "opset": config.export.opset,
        "quantize": quantize and quantize.model_dump(mode="json", exclude={"qat"}),
        "engines": [engine.model_dump(mode="json") for engine in config.engines[:1]],
        "batch_size": config.benchmark.batch_size,
        "profile": job.profile.model_dump(mode="json", exclude={"budget"}),
        "budgets": {
            key: [value, budgets.origin(key)]
            for key, value in budgets.given.items()
            if key.startswith(_LIMITS)
        },
        "target": config.target,
        "machine": machine_of(config.target),
        "libraries": library_versions(("optuna", "torch-pruning", "onnxruntime")),
    }


class CandidateSet:
    """The candidates of a search, with what is known of each.

    Args:
        context: of the running stage.
        data: the data stage's artifact.
        teacher: that of the teacher stage, or a folder like it; None for an ONNX file that was not
            opened yet.

    Attributes:
        entries: the candidates.
        model: predicts their figures.
        limits: the budgets that they have to hold.
        percentile: the latency that counts: ``p95``, or ``p50`` without a limit.
    """

    def __init__(self, context: Context, data: Path, teacher: Path | None) -> None:
        self.context, self.job, self.config = context, context.job, context.job.config
        self.search = section_of(context.job)
        self.task_data = open_task_data(data, self.config)
        self.teacher = teacher
        self.limits = Limits.of(self.job.budgets, self.search.margin)
        self.percentile = latency_percentile(self.limits.values)
        self.say = context.progress.message
        self.folder = context.cache / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries: list[Entry] = []
        self.model = self._cost_model(None)

    def _cost_model(self, footprint: Footprint | None) -> CostModel:
        own = getattr(self.config.engines[0], "threads", None)
        threads = own or self.job.profile.runtime.threads or 1
        return CostModel(self.job.profile, _precisions(self.config.quantize), threads, footprint)

    # Proposing and predicting

    def propose(self) -> None:
        """Propose the candidates, build each network, and count its costs.

        Raises:
            InputError: not one of them can be built and exported.
        """
        network = None
        if self.teacher is not None and (self.teacher / WEIGHTS).is_file():
            network = open_network(self.teacher, self.task_data)
        pool = POOL * self.search.max_candidates
        wanted = self.search.model_copy(update={"max_candidates": pool})
        teacher, spec = self.config.teacher, self.task_data.spec
        found = propose(wanted, teacher, network, spec.inputs, spec.outputs, self.say)
        self.entries = [Entry(candidate) for candidate in found]
        self.context.progress.start("candidates", len(found), "network")
        try:
            for entry in self.entries:
                self._prepare(entry)
                self.context.progress.advance()
        finally:
            self.context.progress.finish()
        self._leave_out_equal()
        for entry in self.entries:
            if entry.status == "failed":
                self.say(f"  {entry.name}: {entry.reason}")
        if all(entry.status == "failed" for entry in self.entries):
            raise no_candidate(self.entries, self.limits)

    def _leave_out_equal(self) -> None:
        """Leave out networks that rounding made the same as an earlier one, weights included."""
        seen: dict[tuple[str, str], str] = {}
        kept = []
        for entry in self.entries:
            if entry.status != "failed":
                student = entry.candidate.student
                forward = str([student.model, student.args, student.resolution])
                identity = (forward, file_sha256(self._first_weights(entry)))
                if (first := seen.setdefault(identity, entry.name)) != entry.name:
                    self.say(f"  {entry.name} is left out: it is the same network as {first}")
                    continue
            kept.append(entry)
        self.entries = kept

    def predict(self) -> list[Entry]:
        """Predict the candidates that were not measured; those that may be feasible."""
        return predict_all(self.entries, self.model, self.limits, self.teacher_figures)

    def _prepare(self, entry: Entry) -> None:
        """Write a candidate's network and count its costs, unless that was done."""
        folder = self.place(entry)
        try:
            if not (folder / _COSTS).is_file():
                partial = folder.with_suffix(".partial")
                for leftover in (folder, partial):
                    shutil.rmtree(leftover, ignore_errors=True)
                (partial / _ARTIFACT).mkdir(parents=True)
                own = with_student(self.task_data, entry.candidate.student)
                teacher = self.teacher or partial
                model, _ = write_student(
                    own, self.job, teacher, partial / _ARTIFACT, lambda text: None,
                    check=entry.candidate.origin == "list",
                )  # fmt: skip
                store(partial / _COSTS, asdict(self._count(model)))
                partial.rename(folder)
            entry.costs = _read_costs(folder / _COSTS)
        except (InputError, StageError) as error:
            entry.reject("failed", _text(error))

    def _count(self, model: DictModel) -> GraphCosts:
        from edgekd.onnx.export import export_onnx, export_to_count

        file, batch = self.context.scratch / "counted.onnx", self.config.benchmark.batch_size
        if not export_to_count(model, file, batch):
            export_onnx(model, file, self.config.export.opset)
        costs = graph_costs(file, batch)
        file.unlink()
        return costs

    def place(self, entry: Entry) -> Path:
        """The folder of a candidate."""
        return self.folder / self.key(entry.candidate.student, {})[:16]

    def key(self, student: StudentConfig, more: Mapping[str, Any]) -> str:
        """Identifies a candidate's network with its initial weights, and what ``more`` adds: that
        of a training, which depends on the teacher's weights too.
        """
        section = student.model_dump(mode="json", exclude_defaults=True)
        if student.checkpoint is not None:
            section["checkpoint"] = file_sha256(self.job.existing_file(student.checkpoint, _WHERE))
        weights = self._weights if more or student.model == TEACHERS_OWN else None
        parts = {**self._common, **more, "weights": weights, "section": section}
        own = {"own": references_sha256(parts), "extensions": extension_versions(parts)}
        return json_sha256(parts | own)

    @cached_property
    def _common(self) -> dict[str, Any]:
        return {
            "data": self.task_data.digest,
            "teacher": self.config.teacher.model_dump(
                mode="json", exclude={"train", "checkpoint", "onnx"}
            ),
            "task": self.job.task_settings,
            "seed": self.config.seed,
            "opset": self.config.export.opset,
            "batch_size": self.config.benchmark.batch_size,
            "code": code_sha256(
                ("edgekd.stages.build_student", "edgekd.students.costs", "edgekd.onnx.export")
            ),
            "libraries": library_versions(("torch", "torch-pruning", "onnxscript")),
        }

    @cached_property
    def _weights(self) -> dict[str, str]:
        """The hashes of the teacher's files."""
        files = sorted(self.teacher.iterdir()) if self.teacher is not None else []
        kept = (".safetensors", ".onnx")
        return {file.name: file_sha256(file) for file in files if file.suffix in kept}

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
        """The teacher's costs; None where it cannot be counted yet."""
        if self.teacher is None:
            return None
        key = json_sha256([self._common, self._weights])[:16]
        file = self.folder / f"teacher-{key}.json"
        if not file.is_file():
            if (self.teacher / BLACK_BOX).is_file():
                assert self.teacher_file is not None
                costs = graph_costs(self.teacher_file, self.config.benchmark.batch_size)
            else:
                costs = self._count(open_network(self.teacher, self.task_data))
            store(file, asdict(costs))
        return _read_costs(file)

    @property
    def teacher_figures(self) -> Figures | None:
        """The teacher's size and parameters, and its predicted latency: how much faster than it a
        candidate is gets measured with that one."""
        if not _RATIOS & set(self.limits.values) or (costs := self.teacher_costs) is None:
            return None
        latency = self.model.predict(costs).latency_ms
        return Figures(latency, None, costs.weights_bytes / 1e6, costs.parameters, "float32", 0)

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
        seconds: list[float] = []

        def timed(entry: Entry) -> CandidateMeasurement:
            started = time.monotonic()
            outcome = self.measured(entry)
            seconds.extend([time.monotonic() - started] if outcome.measured else [])
            return outcome

        several = len(self.search.objectives) > 1
        measure_in_turn(
            self.entries, self.model, self.limits, timed, most=self.search.max_candidates,
            several=several, teacher=self.teacher_figures, say=self.say,
        )  # fmt: skip
        if seconds:
            mean = sum(seconds) / len(seconds)
            store(self.folder / SECONDS, {"seconds": mean, "measured": len(seconds)})
        count = sum(entry.figures is not None for entry in self.entries)
        self.say(
            f"  {count} of {len(self.entries)} candidates measured, {len(self.feasible)} of them "
            "hold all limits"
        )

    def measured(self, entry: Entry, weights: Path | None = None) -> CandidateMeasurement:
        """Measure a candidate as it would be shipped, with its initial weights or those of a file.

        Its float32 ONNX file is stored, so that a repeated measurement exports nothing.
        """
        weights = weights or self._first_weights(entry)
        file = self.place(entry) / f"{weights.stem}.onnx"
        try:
            if not file.is_file():
                with atomic_write(file) as partial:
                    export_candidate(self.task_data, self.load(entry, weights), partial)
        except (InputError, StageError) as error:
            assert entry.costs is not None
            return CandidateMeasurement(entry.costs, None, {}, (), _text(error), file, 0)
        fast = "latency.min_speedup" in self.limits.values
        return measure_candidate(
            self.context,
            self.task_data,
            file,
            self.teacher_file if fast else None,
            limits=self.limits,
            teacher_figures=self.teacher_figures,
        )

    @property
    def feasible(self) -> list[Entry]:
        """The measured candidates that hold all limits, the largest first."""
        found = [entry for entry in self.entries if entry.status == "feasible"]
        return sorted(found, key=lambda entry: -(entry.costs.macs if entry.costs else 0))

    def first(self, entry: Entry) -> DictModel:
        """A candidate's network with its initial weights."""
        return self.load(entry, self._first_weights(entry))

    def _first_weights(self, entry: Entry) -> Path:
        return self.place(entry) / _ARTIFACT / FIRST_WEIGHTS

    def load(self, entry: Entry, weights: Path) -> DictModel:
        """A candidate's network with the weights of a file."""
        from edgekd.models.weights import load_weights

        own = with_student(self.task_data, entry.candidate.student)
        model = build_student(own, self.place(entry) / _ARTIFACT)
        load_weights(model, weights, where=f"candidate {entry.name}")
        return model

    # What is recorded

    def record(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The content of ``search.json``; ``about`` are its keys about the choice."""
        task = self.task_data.task
        general = {
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "objectives": list(self.search.objectives),
            **about,
        }
        return search_record(self.entries, self.limits, self.model, general)

    def write(self, winner: Entry, about: Mapping[str, Any]) -> None:
        """Write the student's artifact: that of the winner, its section, and the record."""
        out = self.context.out
        shutil.copytree(self.place(winner) / _ARTIFACT, out, dirs_exist_ok=True)
        section = winner.candidate.student.model_dump(mode="json", exclude_defaults=True)
        write_json(out / SECTION, section, SECTION_SCHEMA)
        write_json(out / SEARCH, self.record(about), SCHEMA)


def _text(error: EdgekdError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what


def _precisions(quantize: QuantizeConfig | None) -> tuple[Precision, ...]:
    """The number formats that may be shipped."""
    if quantize is None:
        return ("fp32",)
    more: list[Precision] = ["int8"] if quantize.int8 is not None else []
    return ("fp32", *more, *([quantize.precision] if quantize.precision is not None else []))


def _read_costs(path: Path) -> GraphCosts:
    value = stored(path)
    return GraphCosts(**{**value, "operators": tuple(value["operators"])})
