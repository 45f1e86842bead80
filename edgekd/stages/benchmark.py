"""Stage benchmark: latency, memory, size and accuracy of the files that would be shipped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgekd.files import write_npz
from edgekd.pipeline.stage import Context, Job
from edgekd.release.result import LATENCIES
from edgekd.stages.engine_builders import common_level
from edgekd.stages.task_data import ENGINES_SCHEMA, TaskData, open_task_data, read_json, write_json

if TYPE_CHECKING:
    from edgekd.onnx.samples import Array
    from edgekd.targets.target import LatencyLimits

ROLES = ("teacher", "student", "baseline")
"""The teacher first: without labels, its predictions replace them."""
_CONSTANT_VALUES = 10_000_000
"""Largest number of target values of a split that the best constant is computed from."""
RECIPE = {
    "task", "task_args", "data", "teacher", "student", "distill", "export", "quantize",
    "engines",
}  # fmt: skip
"""The keys that determine the trained network: runs that share them differ only by their seed."""


class BenchmarkStage:
    """Writes ``result.json``, the figures that gate and report read, and the scores per sample.

    The metric is that of the labelled test samples. When there are none, it is agreement with the
    teacher, whose own is then 1; the gate's ``accuracy`` budgets apply to this metric.
    """

    name = "benchmark"
    inputs = ("data", "engines")
    libraries = ("numpy", "onnxruntime")

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The settings of models, data and measurement, and the machine.

        The machine is included: a figure of another machine is not valid here.
        """
        from edgekd.targets import machine_of

        config = job.config
        return {
            "name": config.name,
            "benchmark": config.benchmark.model_dump(mode="json"),
            "budgets": _budgets(job),
            "profile": job.profile.name,
            "target": config.target,
            "machine": machine_of(config.target),
            "task": job.task_settings,
            "seed": config.seed,
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Measure the files and write ``result.json``."""
        from edgekd.measurement import evidence_of
        from edgekd.pipeline.fingerprint import library_versions
        from edgekd.release.build_result import Measured, RunInfo, build_result
        from edgekd.release.report_tables import thread_remark
        from edgekd.release.result import SCHEMA as RESULT_SCHEMA
        from edgekd.release.result import recipe_sha256
        from edgekd.targets import LocalTarget, open_target
        from edgekd.tasks import agreement_task

        config, profile = context.job.config, context.job.profile
        task_data = open_task_data(inputs["data"], config)
        test = task_data.dataset.splits["test"]
        samples = context.scratch / "test.npz"
        write_npz(samples, task_data.dataset.model_inputs("test", 0, len(test)))
        targets = {
            name: np.asarray(test.arrays[name]) for name in _names(task_data.dataset.targets)
        }

        engines = read_json(inputs["engines"] / "engines.json", ENGINES_SCHEMA)
        target = open_target(config.target)
        files = {
            role: inputs["engines"] / engines[role]["file"] for role in ROLES if role in engines
        }
        settings = {
            "providers": engines["student"]["providers_requested"],
            "threads": engines["student"]["threads"],
        }
        levels = {role: engines[role]["run_level"] for role in files}
        context.progress.message(f"  timing on {target.name}: until steady, then in turn")
        bench = target.bench(
            files["student"],
            against=files["teacher"] if config.benchmark.against == "teacher" else None,
            provider_options=engines["student"].get("provider_options"),
            against_options=engines.get("teacher", {}).get("provider_options"),
            inputs=samples,
            batch=config.benchmark.batch_size,
            min_queries=config.benchmark.min_queries,
            max_seconds=config.benchmark.max_seconds,
            processes=config.benchmark.processes,
            optimization=common_level(levels.values()),
            **settings,
            **_budgets(context.job),
        )
        for reason in bench.get("steadiness", {}).get("reasons", ()):
            context.progress.message(f"  not steady: {reason}")
        if remark := thread_remark(settings["threads"], bench["environment"].get("cpus_usable")):
            context.progress.message(f"  {remark}")
        mismatch = profile.mismatch(bench["environment"])
        if mismatch and config.target != LocalTarget.name:
            context.progress.message(f"  not evidence for {profile.name}: {mismatch}")
        task, labelled = task_data.task, task_data.task.labelled(targets)
        by_teacher = not labelled.any() and "teacher" in files
        if by_teacher:
            task, labelled = agreement_task(task), np.ones(len(test), bool)
            context.progress.message(f"  no test sample has a label: the metric is {task.metric}")
        elif not labelled.all():
            context.progress.message(
                f"  scored on the {int(labelled.sum()):,} of {len(test):,} test samples that have "
                "a label"
            )
        measured = {}
        for role, file in files.items():
            outputs = context.scratch / f"{role}.npz"
            own = engines[role].get("provider_options")
            target.run(
                file,
                samples,
                outputs,
                provider_options=own,
                optimization=levels[role],
                **settings,
            )
            with np.load(outputs) as archive:
                given = {name: archive[name] for name in archive}
            if by_teacher and role == "teacher":
                targets |= task.pseudo_targets(given)
            scores = task.scores(given, targets)[labelled]
            measured[role] = Measured(file, engines[role]["parameters"], scores)
            outputs.unlink()
        samples.unlink()
        origin = RunInfo(
            name=config.name,
            seed=config.seed,
            recipe=recipe_sha256(config.model_dump(mode="json", include=RECIPE)),
            profile=profile.name,
            target=config.target,
            evidence=evidence_of(profile.name, config.target, mismatch),
            versions=library_versions(("edgekd", "torch", "onnx", "onnxruntime", "numpy")),
            fingerprints=context.fingerprints,
        )
        constant = None if by_teacher else _constant_scores(task_data, targets)
        result = build_result(
            origin, task, measured, bench, None if constant is None else constant[labelled]
        )
        write_json(context.out / "result.json", result.to_json(), RESULT_SCHEMA)
        scores = {role: entry.scores for role, entry in measured.items()}
        write_npz(context.out / "scores.npz", scores)


def _budgets(job: Job) -> LatencyLimits:
    """The limits of latency and speed-up, as settings of the benchmark: they decide how many
    processes it takes.
    """
    names = {
        f"latency.{key}": f"budget_{key.removeprefix('min_')}"
        for key in (*LATENCIES, "min_speedup")
    }
    given = job.budgets.given
    found = {name: given[key] for key, name in names.items() if key in given}
    if job.config.benchmark.against == "none":
        found.pop("budget_speedup", None)
    return cast("LatencyLimits", found)


def _names(specs: Any) -> list[str]:
    return [spec.name for spec in specs]


def _constant_scores(task_data: TaskData, targets: Mapping[str, Array]) -> Array | None:
    """(N,) scores on the test samples of the best constant prediction for training and validation.

    None where no sample of them has a target. Of many samples an evenly spaced subset is used.
    """
    from edgekd.tasks import constant_outputs

    task, parts = task_data.task, []
    for split in ("train", "validation"):
        arrays = task_data.dataset.splits[split].arrays
        rows = task_data.labelled_rows(split)
        size = max(1, int(np.prod(arrays[task.target].shape[1:])))
        wanted = min(len(rows), max(1, _CONSTANT_VALUES // size))
        rows = rows[np.linspace(0, len(rows) - 1, wanted).astype(int)] if len(rows) else rows
        parts.append({name: np.asarray(arrays[name][rows]) for name in targets})
    known = {name: np.concatenate([part[name] for part in parts]) for name in targets}
    if len(known[task.target]) == 0:
        return None
    count = len(targets[task.target])
    scores: Array = task.scores(constant_outputs(task, known, count), targets)
    return scores
