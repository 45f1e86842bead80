"""Files scored on the validation split, batch by batch."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.stages.task_data import TaskEvaluator
from edgekd.tasks.classification import Classification
from tests.onnx_builders import Graph, run

CLASSES = 5


class Split:
    def __init__(self, labels):
        self.arrays = {"label": labels}

    def __len__(self):
        return len(self.arrays["label"])


def ground(x, labels):
    return SimpleNamespace(
        task=Classification(),
        dataset=SimpleNamespace(
            splits={"validation": Split(labels)},
            targets=[SimpleNamespace(name="label")],
            model_inputs=lambda split, start, stop: {"x": x[start:stop]},
        ),
    )


def model(path, seed, features=4):
    """x (n, 8) to logits (n, 5) and features (n, features)."""
    g = Graph(seed)
    g.add("MatMul", ["x", g.weight("w", 8, CLASSES)], "logits", "head")
    g.add("MatMul", ["x", g.weight("v", 8, features)], "features", "other")
    return g.save(path, {"x": ["b", 8]}, {"logits": ["b", CLASSES], "features": ["b", features]})


@pytest.fixture
def files(tmp_path):
    return model(tmp_path / "a.onnx", 1), model(tmp_path / "b.onnx", 2)


# More than one batch of 64, the last one not full.
X = np.random.default_rng(0).standard_normal((150, 8)).astype(np.float32)


@pytest.mark.parametrize("labelled", ["all", "some", "none"])
def test_the_drop_is_that_of_the_labelled_samples(files, labelled):
    """Recomputed; without any label, float32's classes are the labels."""
    float32, other = files
    ours, theirs = (run(path, {"x": X})["logits"].argmax(1) for path in files)
    labels = np.random.default_rng(1).integers(0, CLASSES, len(X))
    known = {"all": np.ones, "none": np.zeros}.get(labelled, np.ones)(len(X), bool)
    if labelled == "some":
        known[:70] = False  # a full batch of samples without a label
    wanted = ours if labelled == "none" else labels
    counted = np.ones(len(X), bool) if labelled == "none" else known
    expected = (ours == wanted)[counted].mean() - (theirs == wanted)[counted].mean()

    validation = TaskEvaluator(ground(X, np.where(known, labels, -1)), float32)
    scored = validation.score(run(other, {"x": X}))
    assert (validation.scores - scored).mean() == pytest.approx(expected)
    drop, errors = validation.compare(other, batch=7)
    assert validation.drop_of(other) == pytest.approx(expected)
    assert drop == pytest.approx(expected)
    assert [error.name for error in errors] == ["logits", "features"]
    assert errors[0].argmax_agreement == pytest.approx((ours == theirs).mean())
    assert len(validation.scores) == counted.sum()


def test_memory_does_not_grow_with_the_size_of_the_outputs(tmp_path):
    def peak(features):
        file = model(tmp_path / f"{features}.onnx", 1, features)
        few = ground(np.resize(X, (2048, 8)), np.zeros(2048, int))
        tracemalloc.start()
        TaskEvaluator(few, file).compare(file)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)  # what is loaded once
    # 2,048 × 1,024 floats are 8 MB of outputs of either; a batch of 64 is 0.25 MB, and their
    # comparison in float64 takes some copies of it.
    assert peak(1024) - peak(4) < 5_000_000
