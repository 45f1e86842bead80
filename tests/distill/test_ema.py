"""The moving average of weights, against the recurrence written out."""

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distill.optimizer import EMA


def walk(decay, steps):
    """A network whose state changes at random, its average, and both histories in numpy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = EMA(model, decay)
    seen = []
    for step in range(steps):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
                else:
                    tensor.fill_(step + 1)
        average.update_parameters(model)
        seen.append({key: value.numpy().copy() for key, value in model.state_dict().items()})
    return average, seen


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_it_is_the_recurrence_with_a_decay_that_warms_up(decay):
    average, seen = walk(decay, 30)
    state = average.module.state_dict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            assert int(value) == 30
            continue
        expected = seen[0][key]
        for t in range(1, 30):
            d = min(decay, (1 + t) / (10 + t))
            expected = d * expected + (1 - d) * seen[t][key]
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_its_state_comes_back_with_its_count():
    average, _ = walk(0.9, 7)
    other, _ = walk(0.9, 2)
    other.load_state_dict(average.state_dict())
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average.update_parameters(model)
    other.update_parameters(model)
    first, second = average.state_dict(), other.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_network_itself_is_not_touched():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    average = EMA(model, 0.5)
    for _ in range(3):
        average.update_parameters(model)
    assert torch.equal(model.weight, before)
    assert average.module.weight is not model.weight
