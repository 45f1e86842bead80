"""Whether a candidate that was accepted breaks its limit when it is measured again.

    python tests/benchmarks/candidate_limits.py FOLDER [--cases 20] [--margin 0.1]

Limits of latency (p50 and p95) and memory are drawn near what was measured before. Each candidate
that holds its limits is measured again: as a candidate, and as the gate does (one process with
1,000 queries, the complete interval within the limit). Other work on the machine is part of the
test.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import torch

from edgekd.api import execute, open_job
from edgekd.config.networks import ModelConfig
from edgekd.models import build_model
from edgekd.pipeline.stage import Context, Job
from edgekd.progress import Console, ConsoleProgress
from edgekd.stages.measure_candidate import measure_candidate
from edgekd.stages.task_data import open_task_data
from edgekd.students.constraints import Limits
from edgekd.students.costs import Figures
from edgekd.targets import LocalTarget

PIPELINE = """
name: limits
data: {source: digits}
profile: host
teacher: {model: convnet-l, train: {epochs: 1}}
student: {model: convnet-xs}
"""
NETWORKS = ["convnet-xs", "convnet-s", "convnet-m", "convnet-l"]
FACTORS = (0.9, 1.5)


def main() -> None:
    """Draw the cases, measure, and print a row for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--margin", type=float, default=0.1)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "limits.yaml").write_text(PIPELINE)
    job = open_job(options.folder / "limits.yaml")
    outcome = execute(job, options.folder / "run", until="data")
    task_data = open_task_data(outcome.folder("data"), job.config)
    open_limits = Limits({}, {}, options.margin)
    models, usual = {}, {}
    for name in NETWORKS:
        torch.manual_seed(0)
        spec = task_data.spec
        models[name] = build_model(ModelConfig(model=name), spec.inputs, spec.outputs)
        context = _context(job, options.folder / "usual")
        usual[name] = measure_candidate(
            context, task_data, models[name], limits=open_limits
        ).figures
    random.seed(0)
    print("| network | limits | measured | accepted | again | as the gate does |", flush=True)
    print("|---|---|---|---|---|---|")
    broken = accepted = 0
    for case in range(options.cases):
        name = NETWORKS[case % len(NETWORKS)]
        before = usual[name]
        assert before is not None
        drawn = random.uniform(*FACTORS)
        values = {
            "latency.p50_ms": before.latency_ms["p50"].value * drawn,
            "latency.p95_ms": before.latency_ms["p95"].value * drawn * 1.2,
            "memory.peak_mb": before.memory_mb.value * random.uniform(1.0, 1.3),
        }
        limits = Limits(values, dict.fromkeys(values, "gate"), options.margin)
        found, again = (
            measure_candidate(
                _context(job, options.folder / f"{case}-{turn}"), task_data, models[name],
                limits=limits if turn == 0 else open_limits,
            )
            for turn in (0, 1)
        )  # fmt: skip
        assert found.figures is not None
        assert again.figures is not None
        second = _breaks(limits, again.figures)
        gate = _gate(job, found.file, limits)
        accepted += found.feasible
        broken += found.feasible and bool(second)
        p50 = found.figures.latency_ms["p50"]
        print(
            f"| {name} | {', '.join(f'{key} {value:.4g}' for key, value in values.items())} "
            f"| p50 {p50.value:.4g} ({p50.low:.4g} to {p50.high:.4g}), "
            f"{found.figures.processes} processes | {'yes' if found.feasible else 'no'} "
            f"| {second or 'holds'} | {gate or 'holds'} |",
            flush=True,
        )
    print(f"{broken} of {accepted} accepted break a limit when measured again")


def _context(job: Job, folder: Path) -> Context:
    for name in ("scratch", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    progress = ConsoleProgress(Console(), quiet=True)
    return Context(job, folder, folder / "scratch", folder / "cache", progress, {})


def _breaks(limits: Limits, found: Figures) -> str:
    """The limits that the measured values themselves are beyond."""
    figures = {f"latency.{name}_ms": each.value for name, each in found.latency_ms.items()}
    figures["memory.peak_mb"] = found.memory_mb.value if found.memory_mb else math.nan
    return ", ".join(key for key, limit in limits.values.items() if figures[key] > limit)


def _gate(job: Job, file: Path, limits: Limits) -> str:
    """The limits that one process's intervals are not within, as the gate measures."""
    built = next(file.parent.glob("*/float32-built.onnx"))
    timed = LocalTarget().bench(
        built, threads=1, providers=("CPUExecutionProvider",), min_queries=1000, memory=False,
        max_seconds=10.0, inputs=file.parent / "samples.npz", batch=1,
    )["models"][0]["latency"]  # fmt: skip
    keys = [key for key in limits.values if key.startswith("latency.")]
    highs = {key: timed[key.split(".")[1].removesuffix("_ms")]["interval"][1] for key in keys}
    return ", ".join(key for key in keys if highs[key] > limits.values[key])


if __name__ == "__main__":
    main()
