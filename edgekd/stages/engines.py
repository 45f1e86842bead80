"""Stage engines: the deployed files, built for the profile's runtime.

Where the student was also quantized, every candidate is built, run on the validation split and
timed on the target; the one that meets the budgets best becomes the student.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgekd.engines.builder import EngineBuilder, Precision
from edgekd.engines.selection import FLOAT, Candidate, Choice, choose
from edgekd.errors import CrashError
from edgekd.files import write_npz
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.engine_builders import (
    StudentVariant,
    common_level,
    lowest_precision,
    open_builder,
    refused_variants,
    variants_of,
    write_further,
)
from edgekd.stages.quantize import STUDENT, Runtime, runtime_of
from edgekd.stages.task_data import (
    CHOICE_SCHEMA,
    ENGINES_SCHEMA,
    TaskEvaluator,
    drop_unit_of,
    open_task_data,
    write_json,
)

if TYPE_CHECKING:
    from edgekd.targets import Target

TIMED_QUERIES, TIMED_SECONDS = 1000, 10.0
"""For the selection only; the benchmark stage measures the selected file at length."""
COMPARED = 64
"""Validation samples on which a built engine is compared with its ONNX file."""


class EnginesStage:
    """Writes for each role the file that is run and ``engines.json`` with its settings.

    The first entry of ``engines`` is measured. Next to it: ``choice.json``; in ``others/``
    the student's candidates that were not selected; in ``further/`` the student for each additional
    entry and for TensorRT: the ONNX file, how to build it on the device, and the engine where it
    is built here.
    """

    name = "engines"
    inputs = ("data", "export", "quantize")
    libraries = ("numpy", "onnx", "onnxruntime")

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The engines, the selection's settings and budgets, and the machine."""
        from edgekd.targets import machine_of

        config = job.config
        measured = {
            "max_drop": config.quantize.max_drop,
            "select": config.quantize.select,
            "budgets": {
                key: value
                for key, value in job.budgets.given.items()
                if key.startswith(("size.", "latency."))
            },
            "task": job.task_settings,
        } if config.quantize is not None else None  # fmt: skip
        kinds = {engine.kind for engine in config.engines}
        # Timings and TensorRT engines are valid for one machine and one release.
        bound = config.quantize is not None or kinds != {"onnxruntime"}
        return {
            "engines": [engine.model_dump(mode="json") for engine in config.engines],
            "batch_size": config.benchmark.batch_size,
            "profile": job.profile.model_dump(mode="json", include={"runtime", "gpu"}),
            "memory": job.budgets["memory.peak_mb"] if kinds != {"onnxruntime"} else None,
            "choice": measured,
            "target": config.target if bound else None,
            "machine": machine_of(config.target) if bound else None,
            "tensorrt": _tensorrt_versions(kinds),
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Build the engines, and select the student's candidate."""
        from edgekd.measurement import evidence_of

        first, *further = context.job.config.engines
        task_data = open_task_data(inputs["data"], context.job.config)
        count = min(COMPARED, len(task_data.dataset.splits["validation"]))
        samples = task_data.dataset.model_inputs("validation", 0, count)
        builder = open_builder(context, first, samples)
        engines = _StudentEngines(context, inputs, builder, runtime_of(context.job, first))
        rows = {}
        for exported in sorted(inputs["export"].glob("*.onnx")):
            if exported.name != STUDENT:
                out = context.out / f"{exported.stem}{builder.suffix}"
                rows[exported.stem] = engines.build(exported, out, "fp32")
        choice, chosen, rows["student"] = engines.select()
        if builder.suffix != ".onnx":
            write_further(context, first, chosen, builder, rows["student"])
        for engine in further:
            variant = lowest_precision(
                context, variants_of(inputs, runtime_of(context.job, engine))
            )
            write_further(context, engine, variant, open_builder(context, engine, samples), None)
        write_json(context.out / "engines.json", rows, ENGINES_SCHEMA)
        unit = drop_unit_of(task_data.task)
        write_json(
            context.out / "choice.json", choice.to_json() | {"drop_unit": unit}, CHOICE_SCHEMA
        )
        if len(choice.rows) > 1 or choice.refused:
            context.progress.message(f"  {choice.chosen} is selected: {choice.reason}")
            profile, quantize = context.job.profile.name, context.job.config.quantize
            measured = quantize is not None and quantize.select == "measured"
            slower = any(row.candidate.shown_faster is False for row in choice.rows)
            evidence = evidence_of(profile, context.job.config.target)
            if measured and slower and evidence != "measured-on-target":
                context.progress.message(
                    f"  timed on this {platform.machine()} and not on {profile}, where it may be "
                    "otherwise: quantize.select: int8 (half, smallest) insists on one, edgekd gate "
                    "--device checks the device's figures against the budgets"
                )
        context.progress.message(f"  {builder.describe()}")


def _tensorrt_versions(kinds: Collection[str]) -> dict[str, str | None]:
    """The installed releases: an engine loads only with the release that built it."""
    from edgekd.config.host import version_of

    packages = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    return {kind: version_of(packages[kind]) for kind in sorted(set(kinds) & set(packages))}


class _Built(NamedTuple):
    """A variant of the student with its engine, and that one's row of ``engines.json``."""

    variant: StudentVariant
    file: Path
    row: Mapping[str, Any]


class _StudentEngines:
    """Builds engines for the measured runtime, and selects the best of the student's variants."""

    def __init__(
        self, context: Context, inputs: Mapping[str, Path], builder: EngineBuilder, runtime: Runtime
    ) -> None:
        self.context, self.inputs = context, inputs
        self.builder, self.runtime = builder, runtime

    def build(
        self, source: Path, out: Path, precision: Precision, keep: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Build one engine; returns its row of ``engines.json``."""
        from edgekd.onnx.file import describe_onnx

        row = self.builder.build(source, out, precision, keep)
        # Counted before optimization, which folds and fuses parameters away.
        return row | {"file": out.name, "parameters": describe_onnx(source).parameters}

    def select(self) -> tuple[Choice, StudentVariant, dict[str, Any]]:
        """Build every variant, select one, and move its engine to the student's path."""
        folder = self.context.out / "others"
        folder.mkdir()
        built: list[_Built] = []
        crashed: dict[str, str] = {}
        for variant in variants_of(self.inputs, self.runtime):
            file = folder / f"student-{variant.name}{self.builder.suffix}"
            try:
                row = self.build(variant.file, file, variant.precision, variant.kept)
            except CrashError as error:
                if variant.name == FLOAT:
                    raise
                crashed[variant.name] = error.what
            else:
                built.append(_Built(variant, file, row))
        choice = self._choose(built, crashed)
        chosen = next(each for each in built if each.variant.name == choice.chosen)
        place = self.context.out / f"student{self.builder.suffix}"
        for left in folder.glob(f"{chosen.file.name}*"):
            # An engine's record is next to it under its name.
            shutil.move(left, place.parent / left.name.replace(f"-{choice.chosen}", "", 1))
        if not any(folder.iterdir()):
            folder.rmdir()
        if self.builder.suffix != ".onnx":
            shutil.copyfile(chosen.variant.file, self.context.out / STUDENT)
        parameters = built[0].row["parameters"]
        row = {"file": place.name, "parameters": parameters, "precision": choice.chosen}
        return choice, chosen.variant, {**chosen.row, **row}

    def _choose(self, built: Sequence[_Built], crashed: Mapping[str, str]) -> Choice:
        config = self.context.job.config
        refused = {**refused_variants(self.inputs, self.runtime), **crashed}
        allowed = config.quantize.max_drop if config.quantize is not None else 0.0
        budgets = self.context.job.budgets
        select = config.quantize.select if config.quantize is not None else "measured"
        if len(built) == 1:
            # With one candidate nothing needs to be measured.
            alone = Candidate(FLOAT, built[0].file.stat().st_size, 0.0, None, {})
            return choose([alone], budgets, allowed, refused=refused, select=select)
        benchmark = _CandidateBenchmark(self, built[0])
        teacher = self.context.out / f"teacher{self.builder.suffix}"
        has_teacher = teacher.is_file()
        return choose(
            [benchmark.candidate(each) for each in built],
            budgets,
            allowed,
            teacher.stat().st_size if has_teacher else None,
            benchmark.speedup_over(teacher)
            if has_teacher and budgets["latency.min_speedup"] is not None
            else None,
            refused,
            select,
        )


class _CandidateBenchmark:
    """Accuracy and latency of the built variants on the target, against float32's engine."""

    def __init__(self, engines: _StudentEngines, float32: _Built) -> None:
        from edgekd.targets import open_target

        context = engines.context
        self.context, self.float32, self.settings = context, float32, engines.builder.settings
        self.target: Target = open_target(context.job.config.target)
        task_data = open_task_data(engines.inputs["data"], context.job.config)
        self.evaluator = TaskEvaluator(task_data, engines.inputs["export"] / STUDENT)
        self.samples = context.scratch / "validation.npz"
        count = self.evaluator.samples.count
        write_npz(self.samples, task_data.dataset.model_inputs("validation", 0, count))
        self.scores = self._scores(float32)

    def candidate(self, built: _Built) -> Candidate:
        """The drop and the latency of one engine against float32."""
        from edgekd.release.statistics import paired_difference

        drop = paired_difference(self.scores, self._scores(built))
        assert drop.value is not None  # There is a score for each sample.
        kept = built.variant.kept
        notes = (f"{len(kept)} layers kept in float32: {', '.join(kept)}",) if kept else ()
        alone = built.variant.name == FLOAT
        record = (
            self._time(built) if alone else self._time(built, self.float32.file, self.float32.row)
        )
        ratio = record["comparison"]
        return Candidate(
            name=built.variant.name,
            size_bytes=built.file.stat().st_size,
            drop=drop.value,
            drop_interval=drop.interval,
            latency_ms={
                name: record["models"][0]["latency"][name]["value"]
                for name in ("p50", "p90", "p95", "p99")
            },
            speedup=ratio["ratio"] if ratio else None,
            speedup_interval=tuple(ratio["interval"]) if ratio and ratio["interval"] else None,
            notes=notes,
        )

    def speedup_over(self, teacher: Path) -> float:
        """The teacher's p50 over float32's."""
        ratio: float = self._time(self.float32, teacher)["comparison"]["ratio"]
        return ratio

    def _time(
        self, built: _Built, against: Path | None = None, row: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Time an engine, against another one with that row of ``engines.json``."""
        other = row or {}
        return self.target.bench(
            built.file,
            against=against,
            inputs=self.samples,
            batch=self.context.job.config.benchmark.batch_size,
            min_queries=TIMED_QUERIES,
            max_seconds=TIMED_SECONDS,
            memory=False,
            provider_options=built.row.get("provider_options"),
            against_options=other.get("provider_options"),
            optimization=common_level((built.row["run_level"], other.get("run_level", "all"))),
            **self.settings,
        )

    def _scores(self, built: _Built) -> Any:
        outputs = self.context.scratch / "outputs.npz"
        self.target.run(
            built.file,
            self.samples,
            outputs,
            provider_options=built.row.get("provider_options"),
            optimization=built.row["run_level"],
            **self.settings,
        )
        with np.load(outputs) as archive:
            scores = self.evaluator.score({name: archive[name] for name in archive})
        outputs.unlink()
        return scores
