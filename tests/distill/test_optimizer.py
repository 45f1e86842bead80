"""Learning-rate schedules."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from edgekd.config.training import TrainConfig
from edgekd.distill.optimizer import build_optimizer, learning_rate
from edgekd.errors import InputError


def rates(schedule, steps, peak=0.5, **keys):
    config = TrainConfig(schedule=schedule, learning_rate=peak, **keys)
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
def test_rates_are_positive_and_never_above_the_peak(schedule, steps):
    assert all(0 < rate <= 0.5 for rate in rates(schedule, steps))


def test_one_cycle_rises_to_its_peak_once_and_falls_to_almost_nothing():
    values = rates("one-cycle", 1000)
    top = values.index(max(values))
    assert values[top] == 0.5
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert values[0] == pytest.approx(0.5 / 25)
    assert values[-1] < 1e-5


def test_cosine_starts_at_its_peak_and_is_half_way_in_the_middle():
    values = rates("cosine", 101)
    assert values[0] == 0.5
    assert values[50] == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("warm_up", [0.01, 0.3, 0.99])
def test_a_warm_up_is_a_line_up_to_the_peak(schedule, steps, warm_up):
    values = rates(schedule, steps, warm_up=warm_up)
    rise = round(warm_up * steps)
    assert all(0 < value <= 0.5 for value in values)
    differences = [b - a for a, b in pairwise(values[:rise])]
    assert differences == pytest.approx([0.5 / (rise + 1)] * len(differences))
    if rise:
        assert values[0] == pytest.approx(0.5 / (rise + 1))
    if rise < steps:
        assert values[rise] == 0.5
        assert values[rise:] == sorted(values[rise:], reverse=True)


def test_cosine_comes_to_almost_nothing_after_a_warm_up_too():
    assert rates("cosine", 100, warm_up=0.2)[-1] < 1e-5


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_only_matrices_are_decayed(kind):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {key: value.clone() for key, value in model.named_parameters()}
    config = TrainConfig(optimizer=kind, weight_decay=0.1, learning_rate=0.1)
    optimizer = build_optimizer(list(model.parameters()), config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) == (value.ndim == 1), key


def test_nothing_to_train():
    with pytest.raises(InputError, match="no parameters to train"):
        build_optimizer([], TrainConfig())
