"""A search for the student against the complete training of every candidate.

``python tests/benchmarks/student_search.py FOLDER [--count 12000]`` trains 24 convnets in full on
the first images of Fashion-MNIST (Debian's ``dataset-fashion-mnist``, or ``--images FOLDER``), and
then searches among them under three sets of limits. It prints each candidate's accuracy on the test
split and, for each search, the winner, the best feasible candidate, and the epochs it trained.
What is in FOLDER already is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from edgekd.api import open_job
from edgekd.models.weights import load_weights
from edgekd.stages.build_student import build_student
from edgekd.stages.task_data import open_task_data

WIDTHS = [[w, w * 3 // 2, w * 3] for w in (4, 6, 8, 12, 16, 24)]
LIMITS = {"large": (0.25, 32, 0.2), "middle": (0.1, 32, 0.1), "small": (0.06, 32, 0.04)}
"""Name → latency in ms, memory and file size in MB."""
EPOCHS, RACED = 12, 3

SOURCE = """\
import gzip, numpy as np

def first(folder, count):
    def read(name, offset, shape):
        with gzip.open(f"{folder}/{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset).reshape(shape)
    def split(name, count=None):
        image = read(f"{name}-images-idx3", 16, (-1, 1, 28, 28))[:count]
        return {"image": image, "label": read(f"{name}-labels-idx1", 8, -1)[:count].astype(int)}
    return {"train": split("train", count), "test": split("t10k")}
"""


def pipeline(images: str, count: int, student: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "search",
        "data": {
            "source": "first:first",
            "args": {"folder": images, "count": count},
            "augment": ["flip", {"erase": {"size": 0.3}}],
        },
        "teacher": {
            "model": "convnet-m",
            "train": {"epochs": 10, "optimizer": "sgd", "learning_rate": 0.1},
        },
        "student": student,
        "distill": {
            "augment": ["flip"],
            "losses": [
                {"hard_labels": {}, "weight": 0.1},
                {"soft_labels": {"temperature": 4}, "weight": 0.9},
            ],
            "cache": {"views": 2},
            "epochs": EPOCHS,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "baseline": False,
        },
        "gate": {"accuracy": {"min": 0.5}},
    }


def run(folder: Path, content: dict[str, Any], out: str, until: str, *options: str) -> None:
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "edgekd", "run", "p.yaml", "-o", out, "--until", until]
    subprocess.run([*command, "-q", *options], cwd=folder, check=True)


def newest(folder: Path, stage: str) -> Path:
    found: Path = max(
        (folder / "artifacts" / stage).glob("*/artifact.json"), key=lambda p: p.stat().st_mtime
    )
    return found.parent


def test_accuracy(folder: Path) -> float:
    """The newest distilled student's accuracy on the test split."""
    task_data = open_task_data(newest(folder / "grid", "data"), open_job(folder / "p.yaml").config)
    model = build_student(task_data, newest(folder / "grid", "student"))
    load_weights(model, newest(folder / "grid", "distill") / "student.safetensors", where="student")
    test = task_data.dataset.splits["test"]
    inputs = task_data.dataset.model_inputs("test", 0, len(test))
    with torch.no_grad():
        outputs = model.eval()({name: torch.from_numpy(a) for name, a in inputs.items()})
    picked = outputs[task_data.task.output].argmax(1).numpy()
    return float((picked == np.asarray(test.arrays["label"])).mean())


def key(args: dict[str, Any]) -> str:
    return json.dumps({name: args[name] for name in ("widths", "blocks", "stem_stride")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--images", default="/usr/share/datasets/fashion-mnist")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "first.py").write_text(SOURCE)
    truth_file = folder / "truth.json"
    truth = json.loads(truth_file.read_text()) if truth_file.is_file() else {}
    for widths, blocks, stride in product(WIDTHS, (0, 1), (1, 2)):
        args = {"widths": widths, "blocks": blocks, "stem_stride": stride}
        if key(args) not in truth:
            student = {"model": "convnet-s", "args": args}
            run(folder, pipeline(given.images, given.count, student), "grid", "distill")
            truth[key(args)] = test_accuracy(folder)
            truth_file.write_text(json.dumps(truth, indent=1))
        print(f"{key(args):60} {100 * truth[key(args)]:6.2f} %", flush=True)
    grid = {"widths": WIDTHS, "blocks": [0, 1], "stem_stride": [1, 2]}
    search = {"candidates": [{"model": "convnet-s", "grid": grid}], "epochs": RACED}
    for name, (latency, memory, size) in LIMITS.items():
        limits = ("--latency-ms", latency, "--memory-mb", memory, "--size-mb", size)
        content = pipeline(given.images, given.count, {"search": search})
        run(folder, content, f"search-{name}", "student", *map(str, limits))
        record = json.loads(
            (newest(folder / f"search-{name}", "student") / "search.json").read_text()
        )
        raced = [c for c in record["candidates"] if c.get("rungs")]
        epochs = sum(rung["epochs"] for c in raced for rung in c["rungs"]) + EPOCHS
        score = {c["name"]: truth[key(c["student"]["args"])] for c in raced}
        best = max(score, key=lambda n: score[n] if math.isfinite(score[n]) else 0.0)
        winner = record["winner"]
        print(
            f"{name}: {winner} {100 * score[winner]:.2f} %, best of {len(raced)} feasible: {best} "
            f"{100 * score[best]:.2f} %; {epochs} of {EPOCHS * len(truth)} epochs"
        )


if __name__ == "__main__":
    main()
