"""Distillation methods side by side: one student, one schedule, several seeds.

    python tests/benchmarks/methods.py pipelines/fashion-mnist.yaml -o methods --seeds 0 1 2

Every method is the pipeline with another ``distill.losses`` (or scheme), as :data:`METHODS` says in
a line each. For each seed the teacher is trained once, and all methods start from the same weights
and see the same batches. The accuracy is that of the chosen weights on the whole test split, which
takes part in no choice. What is done is kept in the folder: run it again to go on, or with
``--table`` alone to print the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edgekd.api import execute, open_job
from edgekd.release.statistics import mean

POOLED = "{student: features, teacher: features}"
LAST = "{student: features.layers.3, teacher: features.layers.6}"
STAGES = (
    "student: [features.layers.1, features.layers.3], "
    "teacher: [features.layers.4, features.layers.6]"
)
SMALL_BANK = "student: features, teacher: features, negatives: 1024, bank: 8192"
HARD = "{hard_labels: {}, weight: 1}"
SOFT = "{hard_labels: {}, weight: 0.1}, {soft_labels: {temperature: 4}, weight: 0.9}"

METHODS: dict[str, list[str]] = {
    "student alone": ["distill.losses=[hard_labels]"],
    "soft labels": [f"distill.losses=[{SOFT}]"],
    "soft labels only, T=1": ["distill.losses=[{soft_labels: {temperature: 1}}]"],
    "soft labels only, T=4": ["distill.losses=[{soft_labels: {temperature: 4}}]"],
    "logit regression": [
        f"distill.losses=[{HARD}, {{output_regression: {{kind: mse}}, weight: 0.1}}]"
    ],
    "teacher's labels": ["distill.losses=[hard_labels, hard_distillation]"],
    "DKD": [
        f"distill.losses=[{HARD}, {{dkd: {{beta: 2}}, weight: {{start: 0, end: 1, over: 0.1}}}}]"
    ],
    "DIST": [f"distill.losses=[{HARD}, {{dist: {{}}, weight: 2}}]"],
    "logit standardization": [
        "distill.losses=[{hard_labels: {}, weight: 0.1}, {logit_standardization: {}, weight: 9}]"
    ],
    "MLKD": [f"distill.losses=[{HARD}, {{mlkd: {{}}, weight: 0.02}}]"],
    "WSLD": [f"distill.losses=[{HARD}, {{wsld: {{}}, weight: 2.5}}]"],
    "WSLD and DKD": [
        f"distill.losses=[{HARD}, {{wsld: {{}}, weight: 1.5}}, "
        "{dkd: {beta: 2}, weight: {start: 0, end: 0.5, over: 0.1}}]"
    ],
    "JSD": [f"distill.losses=[{HARD}, {{jsd: {{}}, weight: 4}}]"],
    "virtual teacher": ["distill.losses=[hard_labels, {tf_kd: {}, weight: 0.1}]"],
    "RKD of logits": [f"distill.losses=[{SOFT}, {{rkd: {{}}, weight: 0.02}}]"],
    "RKD": [f"distill.losses=[{SOFT}, {{rkd: {POOLED}, weight: 0.02}}]"],
    "SP": [f"distill.losses=[{SOFT}, {{sp: {POOLED}, weight: 3000}}]"],
    "PKT": [f"distill.losses=[{SOFT}, {{pkt: {POOLED}, weight: 30000}}]"],
    "FitNets": [f"distill.losses=[{SOFT}, {{fitnets: {LAST}, weight: 10}}]"],
    "AT": [f"distill.losses=[{SOFT}, {{attention: {{{STAGES}}}, weight: 1000}}]"],
    "CRD": [f"distill.losses=[{SOFT}, {{crd: {{{SMALL_BANK}}}, weight: 0.8}}]"],
}
"""What is changed in the pipeline for each method."""


def run(pipeline: Path, folder: Path, method: str, seed: int, overrides: list[str]) -> None:
    """Train one student, and write its test accuracy and history down."""
    done = folder / f"{method.replace(' ', '-')}-{seed}.json"
    changes = [str(pipeline), *overrides, *METHODS[method]]
    if done.is_file():
        if json.loads(done.read_text())["changes"] != changes:
            raise SystemExit(f"{done} was measured with other settings: give another --output")
        return
    job = open_job(pipeline, [
        f"seed={seed}", "distill.baseline=false", *overrides, *METHODS[method]
    ])  # fmt: skip
    outcome = execute(job, folder / f"run-{seed}", until="distill")

    from edgekd.data.loader import Loader
    from edgekd.distill.teacher import ModuleTeacher
    from edgekd.distill.trainer import score
    from edgekd.models.weights import load_weights
    from edgekd.stages.build_student import build_student
    from edgekd.stages.task_data import open_task_data, read_json
    from edgekd.stages.teacher import open_teacher

    ground = open_task_data(outcome.folder("data"), job.config)
    student = build_student(ground, outcome.folder("student"))
    load_weights(student, outcome.folder("distill") / "student.safetensors")
    test = Loader("test", ground.dataset, 500)
    teacher = open_teacher(outcome.folder("teacher"), ground)
    history = read_json(outcome.folder("distill") / "student-history.json")
    row = {
        "method": method,
        "seed": seed,
        "student": float(score(ModuleTeacher(student).predict, test, ground.task).mean()),
        "teacher": float(score(teacher.predict, test, ground.task).mean()),
        "best_epoch": history["best_epoch"],
        "validation": [epoch["validation"] for epoch in history["epochs"]],
        "seconds": sum(epoch["seconds"] for epoch in history["epochs"]),
        "changes": changes,
    }
    done.write_text(json.dumps(row, indent=1))
    print(f"{method:24} seed {seed}: {100 * row['student']:.2f} % in {row['seconds']:.0f} s",
          flush=True)  # fmt: skip


def table(folder: Path) -> None:
    """Print the mean over seeds with its interval, and the gap closed."""
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    by_method: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["seed"]] = row
    if "student alone" not in by_method:
        raise SystemExit("no gap without the student alone: run --methods 'student alone' too")
    alone = {seed: row["student"] for seed, row in by_method["student alone"].items()}
    teacher = {seed: row["teacher"] for seed, row in by_method["student alone"].items()}
    print("| method | seeds | test accuracy, % | gap closed, % | s |\n|---|---:|---:|---:|---:|")
    _line("teacher", [100 * value for value in teacher.values()], None, None)

    def by_accuracy(method: str) -> float:
        return -_mean([row["student"] for row in by_method[method].values()])

    for method in sorted(by_method, key=by_accuracy):
        seeds = sorted(set(by_method[method]) & set(alone))
        accuracy = [100 * by_method[method][seed]["student"] for seed in seeds]
        gap = [
            100 * (by_method[method][s]["student"] - alone[s]) / (teacher[s] - alone[s])
            for s in seeds
        ]
        seconds = _mean([by_method[method][seed]["seconds"] for seed in seeds])
        _line(method, accuracy, gap if method != "student alone" else None, seconds)


def _line(name: str, accuracy: list[float], gap: list[float] | None, seconds: float | None) -> None:
    cells = [name, str(len(accuracy)), _interval(accuracy), _interval(gap) if gap else "–",
             "–" if seconds is None else f"{seconds:.0f}"]  # fmt: skip
    print("| " + " | ".join(cells) + " |")


def _interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    figure = mean(values)
    assert figure.interval is not None
    return f"{figure.value:.2f} ({figure.interval[0]:.2f} to {figure.interval[1]:.2f})"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--set", nargs="+", dest="overrides", default=[], metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.pipeline is not None:
        for seed in given.seeds:
            for method in given.methods:
                run(given.pipeline, given.output, method, seed, given.overrides)
    if given.table or given.pipeline is not None:
        table(given.output)
