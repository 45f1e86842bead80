"""A pruned teacher with the weights that it inherits, against the same structure from scratch.

    python tests/benchmarks/pruning_inheritance.py pipelines/fashion-mnist.yaml -o FOLDER \\
        --set teacher.train.epochs=10 --set distill.epochs=4

Both are distilled from the same teacher for the same epochs over the same batches; the table is of
the test split. The default of ``student.prune.inherit`` is what wins.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from edgekd.api import execute, open_job

RATIOS = (0.25, 0.5, 0.75, 0.875)


def run(pipeline: Path, folder: Path, ratio: float, inherit: bool, seed: int, more: list[str]):
    """Train one student; its test accuracy, parameters and validation curve, written down."""
    done = folder / f"{ratio}-{'inherited' if inherit else 'scratch'}-{seed}.json"
    student = f"{{model: teacher, prune: {{ratio: {ratio}, inherit: {str(inherit).lower()}}}}}"
    changes = [*more, f"seed={seed}", "distill.baseline=false", "gate={}", f"student={student}"]
    if done.is_file() and json.loads(done.read_text())["changes"] == changes:
        return json.loads(done.read_text())
    job = open_job(pipeline, changes)
    outcome = execute(job, folder / f"run-{seed}", until="distill")

    from edgekd.data.loader import Loader
    from edgekd.distill.teacher import ModuleTeacher
    from edgekd.distill.trainer import score
    from edgekd.models.dict_model import count_parameters
    from edgekd.models.weights import load_weights
    from edgekd.stages.build_student import build_student
    from edgekd.stages.task_data import HISTORY_SCHEMA, open_task_data, read_json

    task_data = open_task_data(outcome.folder("data"), job.config)
    network = build_student(task_data, outcome.folder("student"))
    load_weights(network, outcome.folder("distill") / "student.safetensors")
    test = Loader("test", task_data.dataset, 500)
    history = read_json(outcome.folder("distill") / "student-history.json", HISTORY_SCHEMA)
    row = {
        "changes": changes,
        "parameters": count_parameters(network),
        "accuracy": float(score(ModuleTeacher(network).predict, test, task_data.task).mean()),
        "first": history["epochs"][0]["validation"],
        "epochs": len(history["epochs"]),
    }
    done.write_text(json.dumps(row, indent=1))
    return row


def main() -> None:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print("| removed | parameters | epochs | inherited, % | from scratch, % | after one epoch, % |")
    print("|---:|---:|---:|---:|---:|---|")
    for ratio in RATIOS:
        rows = {
            inherit: [
                run(options.pipeline, options.output, ratio, inherit, seed, options.changes)
                for seed in range(options.seeds)
            ]
            for inherit in (True, False)
        }
        mean = {
            inherit: {key: 100 * statistics.mean(row[key] for row in each)
                      for key in ("accuracy", "first")}
            for inherit, each in rows.items()
        }  # fmt: skip
        one = rows[True][0]
        print(
            f"| {ratio:g} | {one['parameters']:,} | {one['epochs']} | {mean[True]['accuracy']:.2f} "
            f"| {mean[False]['accuracy']:.2f} | {mean[True]['first']:.2f} against "
            f"{mean[False]['first']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
