"""MK-MMD against loops over pairs, and what a distance of distributions must do."""

import math

import numpy as np
import pytest
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.relation import mk_mmd
from edgekd.errors import InputError
from tests.distill.losses.samples import normal


def in_loops(s, t):
    s, t = s.numpy(), t.numpy()
    points = [*s, *t]
    many = len(points)
    squares = [math.dist(a, b) ** 2 for a in points for b in points]
    mean = sum(squares) / (many * (many - 1))

    def k(a, b):
        d = math.dist(a, b) ** 2
        return sum(math.exp(-d / (2 * 2.0**p * mean)) for p in (-3, -2, -1, 0, 1)) / 5

    def within(x):
        return np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])

    return within(s) + within(t) - 2 * np.mean([k(a, b) for a in s for b in t])


@pytest.mark.parametrize("sizes", [(5, 5), (4, 7), (2, 2)])
def test_mk_mmd_is_the_published_formula(sizes):
    s, t = normal((sizes[0], 3), (sizes[1], 3), scale=1.0)
    assert mk_mmd(s, t).item() == pytest.approx(in_loops(s, t), rel=1e-10)


def test_one_distribution_gives_0_on_average_and_another_more():
    same = [mk_mmd(*normal((16, 4), (12, 4), seed=n, scale=1.0)).item() for n in range(200)]
    error = np.std(same) / math.sqrt(len(same))
    # Unbiased: within four standard errors of 0, with values on both sides.
    assert abs(np.mean(same)) < 4 * error
    assert min(same) < 0 < max(same)
    s, t = normal((16, 4), (12, 4), scale=1.0)
    assert mk_mmd(s, t + 2).item() > 10 * np.std(same)


def test_orders_and_what_is_done_to_both_sets_do_not_matter():
    s, t = normal((6, 4), (5, 4), scale=1.0)
    rotation = torch.linalg.qr(normal((4, 4), seed=1, scale=1.0)[0]).Q
    expected = mk_mmd(s, t)
    for changed in (
        mk_mmd(s.flip(0), t),
        mk_mmd(t, s),
        mk_mmd(s @ rotation * 100 + 3, t @ rotation * 100 + 3),
    ):
        torch.testing.assert_close(changed, expected, rtol=1e-9, atol=1e-12)


def test_gradient():
    """Against central differences at a fixed bandwidth, which passes no gradient."""
    s, t = normal((4, 3), (5, 3), scale=1.0)
    s.requires_grad_()
    mk_mmd(s, t).backward()
    points = torch.cat([s.detach(), t])
    mean = (torch.cdist(points, points) ** 2).sum() / 72
    step = 1e-6

    def fixed(s):
        def k(a, b):
            d = (a[:, None] - b).square().sum(-1)
            return sum((-d / (2 * 2.0**p * mean)).exp() for p in range(-3, 2)) / 5

        return (k(s, s).sum() - 4) / 12 - 2 * k(s, t).mean()

    for index in np.ndindex(4, 3):
        moved = torch.zeros(4, 3, dtype=torch.float64)
        moved[index] = step
        slope = (fixed(s.detach() + moved) - fixed(s.detach() - moved)) / (2 * step)
        # Central differences err by step² and by rounding over step: 1e-10.
        assert s.grad[index].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_coincident_samples_are_finite(dtype):
    s = torch.full((4, 3), 6e4, dtype=dtype, requires_grad=True)
    for t in (torch.full((4, 3), 6e4, dtype=dtype), torch.full((5, 3), -6e4, dtype=dtype)):
        value = mk_mmd(s, t)
        value.backward()
        assert value.isfinite()
        assert s.grad.isfinite().all()


@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((1, 3), (4, 3))])
def test_what_cannot_be_compared_is_refused(shapes):
    with pytest.raises(InputError, match="not two sets of one width"):
        mk_mmd(*normal(*shapes, scale=1.0))


def test_it_is_a_loss_of_a_pipeline():
    assert LOSSES["mk_mmd"] is mk_mmd
