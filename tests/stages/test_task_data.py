"""Drops on the validation split: of an error a share of a constant's, with the metric's sign."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.errors import InputError
from edgekd.spec import TensorSpec
from edgekd.stages.task_data import TaskEvaluator, read_json, write_json
from edgekd.tasks import Regression
from tests.onnx_builders import save_onnx


def add_constant(path, value):
    """prediction = features + value, (N, 1)."""
    text = """(float[batch,1] features) => (float[batch,1] prediction)
    { prediction = Add (features, value) }"""
    return save_onnx(path, text, {"value": np.float32([value])})


class Data:
    """A validation split of 50 samples whose target is the feature."""

    inputs = (TensorSpec("features", ("batch", 1)),)
    targets = (TensorSpec("target", ("batch", 1)),)

    def __init__(self, values):
        self.values = values

    @property
    def splits(self):
        return {"validation": self}

    @property
    def arrays(self):
        return {"target": self.values}

    def __len__(self):
        return len(self.values)

    def model_inputs(self, split, start, stop):
        return {"features": self.values[start:stop]}


def validation(tmp_path, values, off=0.0):
    task_data = SimpleNamespace(dataset=Data(values), task=Regression())
    return TaskEvaluator(task_data, add_constant(tmp_path / "float.onnx", off))


@pytest.mark.parametrize("unit", [1.0, 1e5])
def test_the_drop_of_an_error_is_a_share_of_the_constants(tmp_path, unit):
    values = (unit * np.linspace(-1, 1, 50)).astype(np.float32)[:, None]
    found = validation(tmp_path, values, off=0.2 * unit)
    constant = np.abs(values - np.median(values)).mean()
    worse, better = (
        found.drop_of(add_constant(tmp_path / f"{k}.onnx", k * unit)) for k in (0.3, 0.1)
    )
    assert worse == pytest.approx(0.1 * unit / constant, rel=1e-3)
    assert better == pytest.approx(-0.1 * unit / constant, rel=1e-3)


def test_a_lower_error_is_said_to_be_lower(tmp_path):
    values = (1e5 * np.linspace(-1, 1, 50)).astype(np.float32)[:, None]
    found = validation(tmp_path, values, off=200.0)
    drop = found.drop_of(add_constant(tmp_path / "int8.onnx", 66.4))
    assert found.change_text(drop).startswith("−133.6 mae")
    assert found.change_text(-drop).startswith("+133.6 mae")
    assert found.change_text(0.0) == "mae as float32's"


def test_targets_that_are_all_one_number_have_no_share(tmp_path):
    with pytest.raises(InputError, match="the same prediction"):
        validation(tmp_path, np.full((50, 1), 3.0, np.float32))


def test_files_have_a_schema_which_older_ones_lack(tmp_path):
    path, content = tmp_path / "choice.json", {"chosen": "float32"}
    write_json(path, content, "edgekd.choice/2")
    assert read_json(path, "edgekd.choice/2") == content
    with pytest.raises(InputError, match=r"schema 'edgekd.choice/2', not 'edgekd.choice/3'"):
        read_json(path, "edgekd.choice/3")
    path.write_text(json.dumps(content))
    assert read_json(path, "edgekd.choice/2") == content
