"""Stage engines: the deployed files, built for the profile's runtime.

Where the student was also quantized, every candidate is built, run on the validation split and
timed on the target; the one that meets the budgets best becomes the student.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.engines.builder import EngineBuilder, Precision
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
from edgekd.stages.task_data import Validation, open_task_data, write_json

if TYPE_CHECKING:
    from edgekd.engines.selection import Candidate, Choice
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
        config = job.config
        measured = {
            "max_drop": config.quantize.max_drop,
            "select": config.quantize.select,
            "size": config.gate.size.model_dump(mode="json"),
            "latency": config.gate.latency.model_dump(mode="json"),
            "task": [config.task, config.task_args],
        } if config.quantize is not None else None  # fmt: skip
        kinds = {engine.kind for engine in config.engines}
        # Timings and TensorRT engines are valid for one machine and one release.
        bound = config.quantize is not None or kinds != {"onnxruntime"}
        return {
            "engines": [engine.model_dump(mode="json") for engine in config.engines],
            "batch_size": config.benchmark.batch_size,
            "profile": job.profile.model_dump(mode="json", include={"runtime", "budget", "gpu"}),
            "choice": measured,
            "target": config.target if bound else None,
            "machine": [platform.node(), platform.machine()] if bound else None,
            "tensorrt": _tensorrt_versions(kinds),
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Build the engines, and select the student's candidate."""
        from edgekd.release.build_result import evidence_of
        from edgekd.release.formatting import OF_CONSTANT, drop_unit

        first, *further = context.job.config.engines
        task_data = open_task_data(inputs["data"], context.job.config)
        count = min(COMPARED, len(task_data.dataset.splits["validation"]))
        samples = task_data.dataset.model_inputs("validation", 0, count)
        builder = open_builder(context, first, samples)
        work = _CandidateBuilder(context, inputs, builder, runtime_of(context.job, first))
        rows = {}
        for exported in sorted(inputs["export"].glob("*.onnx")):
            if exported.name != STUDENT:
                out = context.out / f"{exported.stem}{builder.suffix}"
                rows[exported.stem] = work.build(exported, out, "fp32")
        choice, chosen, rows["student"] = work.student()
        if builder.suffix != ".onnx":
            write_further(context, first, chosen, builder, rows["student"])
        for engine in further:
            way = lowest_precision(context, variants_of(inputs, runtime_of(context.job, engine)))
            write_further(context, engine, way, open_builder(context, engine, samples), None)
        write_json(context.out / "engines.json", rows)
        unit = drop_unit(task_data.task.metric) if task_data.task.higher_is_better else OF_CONSTANT
        write_json(context.out / "choice.json", choice.to_json() | {"drop_unit": unit})
        if len(choice.rows) > 1 or choice.refused:
            context.progress.message(f"  {choice.chosen} is selected: {choice.reason}")
            profile = context.job.profile.name
            quantize = context.job.config.quantize
            measured = quantize is not None and quantize.select == "measured"
            slower = any(
                "faster" in said or "slower" in said for row in choice.rows for said in row.against
            )
            if (
                measured
                and slower
                and evidence_of(profile, context.job.config.target) != "measured-on-target"
            ):
                context.progress.message(
                    f"  timed on this {platform.machine()} and not on {profile}, where it may be "
                    "otherwise: quantize.select: int8 (half, smallest) insists on one, edgekd gate "
                    "--device checks the device's figures against the budgets"
                )
        context.progress.message(f"  {builder.describe()}")


def _tensorrt_versions(kinds: Collection[str]) -> dict[str, str | None]:
    """The installed releases: an engine loads only with the release that built it."""
    from edgekd.doctor import version_of

    packages = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    return {kind: version_of(packages[kind]) for kind in sorted(set(kinds) & set(packages))}


class _CandidateBuilder:
    """Builds engines for the measured runtime, and selects the best of the student's candidates."""

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

    def student(self) -> tuple[Choice, StudentVariant, dict[str, Any]]:
        """Build every candidate, select one, and move it to the student's path."""
        from edgekd.engines.selection import FLOAT

        folder = self.context.out / "others"
        folder.mkdir()
        ways = variants_of(self.inputs, self.runtime)
        rows, files = {}, {}
        crashed: dict[str, str] = {}
        for way in ways:
            files[way.name] = folder / f"student-{way.name}{self.builder.suffix}"
            try:
                rows[way.name] = self.build(way.file, files[way.name], way.precision, way.kept)
            except CrashError as error:
                if way.name == FLOAT:
                    raise
                crashed[way.name] = error.what
        ways = [way for way in ways if way.name not in crashed]
        choice = self._choose(ways, files, rows, crashed)
        place = self.context.out / f"student{self.builder.suffix}"
        for left in files[choice.chosen].parent.glob(f"{files[choice.chosen].name}*"):
            # An engine's record is next to it under its name.
            shutil.move(left, place.parent / left.name.replace(f"-{choice.chosen}", "", 1))
        if not any(folder.iterdir()):
            folder.rmdir()
        chosen = next(way for way in ways if way.name == choice.chosen)
        if self.builder.suffix != ".onnx":
            shutil.copyfile(chosen.file, self.context.out / STUDENT)
        return (
            choice,
            chosen,
            rows[choice.chosen]
            | {
                "file": place.name,
                "parameters": rows[FLOAT]["parameters"],
                "precision": choice.chosen,
            },
        )

    def _choose(
        self,
        ways: list[StudentVariant],
        files: Mapping[str, Path],
        rows: Mapping[str, Mapping[str, Any]],
        crashed: Mapping[str, str],
    ) -> Choice:
        from edgekd.engines.selection import FLOAT, Budgets, Candidate, choose

        config = self.context.job.config
        refused = {**refused_variants(self.inputs, self.runtime), **crashed}
        allowed = config.quantize.max_drop if config.quantize is not None else 0.0
        budgets = Budgets.of(config.gate, self.context.job.profile)
        select = config.quantize.select if config.quantize is not None else "measured"
        if len(ways) == 1:
            # With one candidate nothing needs to be measured.
            alone = Candidate(FLOAT, files[FLOAT].stat().st_size, 0.0, None, {})
            return choose([alone], budgets, allowed, refused=refused, select=select)
        measured = _CandidateBenchmark(
            self, files, {files[name]: row for name, row in rows.items()}
        )
        teacher = self.context.out / f"teacher{self.builder.suffix}"
        has_teacher = teacher.is_file()
        return choose(
            [measured.candidate(way) for way in ways],
            budgets,
            allowed,
            teacher.stat().st_size if has_teacher else None,
            measured.speedup_over(teacher)
            if has_teacher and budgets.min_speedup is not None
            else None,
            refused,
            select,
        )


class _CandidateBenchmark:
    """Accuracy and latency of the built candidates on the target."""

    def __init__(
        self,
        work: _CandidateBuilder,
        files: Mapping[str, Path],
        rows: Mapping[Path, Mapping[str, Any]],
    ) -> None:
        from edgekd.engines.selection import FLOAT
        from edgekd.targets import open_target

        context = work.context
        self.context, self.files, self.settings = context, files, work.builder.settings
        self.rows = rows
        self.target: Target = open_target(context.job.config.target)
        task_data = open_task_data(work.inputs["data"], context.job.config)
        self.validation = Validation(task_data, work.inputs["export"] / STUDENT)
        self.samples = context.scratch / "validation.npz"
        count = self.validation.samples.count
        write_npz(self.samples, task_data.dataset.model_inputs("validation", 0, count))
        self.scores = self._scores(files[FLOAT])

    def candidate(self, way: StudentVariant) -> Candidate:
        """The drop and the latency of one engine against float32."""
        from edgekd.engines.selection import FLOAT, Candidate
        from edgekd.release.statistics import paired_difference

        file = self.files[way.name]
        drop = paired_difference(self.scores, self._scores(file))
        assert drop.value is not None  # There is a score for each sample.
        kept = way.kept
        notes = (f"{len(kept)} layers kept in float32: {', '.join(kept)}",) if kept else ()
        against = None if way.name == FLOAT else self.files[FLOAT]
        record = self._time(file, against)
        ratio = record["comparison"]
        return Candidate(
            name=way.name,
            size_bytes=file.stat().st_size,
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
        from edgekd.engines.selection import FLOAT

        ratio: float = self._time(self.files[FLOAT], teacher)["comparison"]["ratio"]
        return ratio

    def _time(self, file: Path, against: Path | None) -> dict[str, Any]:
        return self.target.bench(
            file,
            against=against,
            inputs=self.samples,
            batch=self.context.job.config.benchmark.batch_size,
            min_queries=TIMED_QUERIES,
            max_seconds=TIMED_SECONDS,
            memory=False,
            provider_options=self._row(file).get("provider_options"),
            against_options=self._row(against).get("provider_options"),
            optimization=common_level(
                self._row(one).get("run_level", "all") for one in (file, against) if one is not None
            ),
            **self.settings,
        )

    def _row(self, file: Path | None) -> Mapping[str, Any]:
        """A file's row of ``engines.json``; empty for the teacher's file."""
        return {} if file is None else self.rows.get(file, {})

    def _scores(self, file: Path) -> Any:
        outputs = self.context.scratch / "answers.npz"
        own = self._row(file)
        self.target.run(
            file,
            self.samples,
            outputs,
            provider_options=own.get("provider_options"),
            optimization=own["run_level"],
            **self.settings,
        )
        with np.load(outputs) as archive:
            scores = self.validation.score({name: archive[name] for name in archive})
        outputs.unlink()
        return scores
