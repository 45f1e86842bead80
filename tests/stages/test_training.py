"""Whether a fresh network predicts in the unit of its targets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.data.dataset import Split
from edgekd.models.dict_model import DictModel
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.stages.training import scale_output
from edgekd.tasks import Classification, Regression

SPEC = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("prediction", ("batch", 1)),))


class Net(nn.Module):
    def __init__(self, times=1.0, plus=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.times, self.plus = nn.Linear(4, 1), times, plus

    def forward(self, x):
        return self.layer(x) * self.times + self.plus


def task_data(task, values):
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(len(values), 4)).astype(np.float32)}
    split = Split({"target": values})
    data = SimpleNamespace(
        splits={"train": split},
        model_inputs=lambda _, start, stop: {k: v[start:stop] for k, v in inputs.items()},
    )
    if isinstance(task, Regression):
        task.fit_unit(split.arrays)
    return SimpleNamespace(task=task, dataset=data), inputs


def prices(count=200):
    return np.random.default_rng(1).normal(150_000, 77_000, (count, 1)).astype(np.float32)


def test_a_network_of_ones_gets_the_unit_of_its_targets():
    values = prices()
    on, inputs = task_data(Regression(), values)
    model = DictModel(Net(), SPEC)
    assert "standardize: false" in scale_output(on, model)
    answers = model({"x": torch.from_numpy(inputs["x"])})["prediction"]
    assert abs(float(answers.detach().mean()) - values.mean()) < values.std()


@pytest.mark.parametrize(
    ("task", "network", "values"),
    [
        # The network multiplies itself; the targets are near 1; it was not wanted; no numbers.
        (Regression(), Net(77_000.0, 150_000.0), prices()),
        (Regression(), Net(), prices() / 1e5 - 1.5),
        (Regression(standardize=False), Net(), prices()),
        (Classification(), Net(), prices()),
    ],
)
def test_others_are_left_as_they_are(task, network, values):
    on, _ = task_data(task, values)
    model = DictModel(network, SPEC)
    assert scale_output(on, model) == ""
    assert model.output_scale is None


def test_who_insists_gets_it():
    on, _ = task_data(Regression(standardize=True), prices() / 1e5 - 1.5)
    model = DictModel(Net(), SPEC)
    assert scale_output(on, model)
    assert model.output_scale is not None
