"""Relation losses against loops over pairs and triplets, and what leaves them unchanged."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.relation import Correlation, correlation, pkt, pooled, rkd, sp
from edgekd.errors import InputError
from tests.distill.losses.samples import normal

ALL = [rkd, sp, pkt, correlation]
ANY_WIDTH = [rkd, sp, pkt]
LAYOUTS = {
    "vectors": ((6, 5), (6, 9)),
    "tokens": ((4, 3, 5), (4, 7, 6)),
    "maps": ((5, 4, 3, 2), (5, 6, 2, 2)),
}


def mean_over_positions(x):
    x = x.numpy()
    if x.ndim == 2:
        return x
    return x.mean(1) if x.ndim == 3 else x.reshape(*x.shape[:2], -1).mean(2)


def smooth_l1(a, b):
    d = abs(a - b)
    return d * d / 2 if d < 1 else d - 0.5


def angle_at(x, i, j, k):
    """The cosine of the angle at i; 0 where two of its points are one."""
    a, b = x[j] - x[i], x[k] - x[i]
    lengths = math.dist(x[i], x[j]) * math.dist(x[i], x[k])
    return a @ b / lengths if lengths else 0.0


def rkd_in_loops(s, t, of_distance, of_angle):
    s, t = mean_over_positions(s), mean_over_positions(t)
    size = len(s)
    pairs = list(itertools.combinations(range(size), 2))
    mean_s = sum(math.dist(s[i], s[j]) for i, j in pairs) / len(pairs)
    mean_t = sum(math.dist(t[i], t[j]) for i, j in pairs) / len(pairs)
    distance = sum(
        2 * smooth_l1(math.dist(s[i], s[j]) / mean_s, math.dist(t[i], t[j]) / mean_t)
        for i, j in pairs
    )
    angle = sum(
        smooth_l1(angle_at(s, i, j, k), angle_at(t, i, j, k))
        for i, j, k in itertools.permutations(range(size), 3)
    )
    return of_distance * distance / size**2 + of_angle * angle / size**3


def similarity_in_loops(s, t):
    def rows(x):
        g = [[float((a * b).sum()) for b in x] for a in x]
        return [[value / math.hypot(*row) for value in row] for row in g]

    a, b = rows(s), rows(t)
    size = len(s)
    return sum((a[i][j] - b[i][j]) ** 2 for i in range(size) for j in range(size)) / size**2


def pkt_in_loops(s, t):
    def probabilities(x):
        x = mean_over_positions(x)
        k = [[(a @ b / math.sqrt(float(a @ a) * float(b @ b)) + 1) / 2 for b in x] for a in x]
        return [[value / sum(row) for value in row] for row in k]

    p, q = probabilities(t), probabilities(s)
    size = len(p)
    # The authors' 1e-7 in numerator and denominator is left out here on purpose.
    return (
        sum(p[i][j] * math.log(p[i][j] / q[i][j]) for i in range(size) for j in range(size))
        / size**2
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rkd_is_the_published_formula(layout):
    s, t = normal(*LAYOUTS[layout])
    for distance, angle in ((25.0, 50.0), (1.0, 0.0), (0.0, 1.0)):
        expected = rkd_in_loops(s, t, distance, angle)
        assert rkd(s, t, distance, angle).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_similarity_is_the_published_formula(layout):
    s, t = normal(*LAYOUTS[layout])
    assert sp(s, t).item() == pytest.approx(similarity_in_loops(s, t), rel=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pkt_is_the_published_formula(layout):
    s, t = normal(*LAYOUTS[layout])
    # 1e-7 against probabilities near 1/5, relative to a divergence near 0.01 per row.
    assert pkt(s, t).item() == pytest.approx(pkt_in_loops(s, t), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_correlation_is_the_published_formula(layout):
    shape = LAYOUTS[layout][0]
    s, t = normal(shape, shape)
    a, b = mean_over_positions(s), mean_over_positions(t)
    size = len(a)
    expected = sum(
        abs(a[i, f] - b[i, f]) * abs(a[i + 1, f] - b[i + 1, f])
        for i in range(size - 1)
        for f in range(a.shape[1])
    ) / (size - 1)
    assert correlation(s, t).item() == pytest.approx(expected, rel=1e-10)


def test_rkd_does_not_normalise_its_features():
    """With L2-normed features, as one library has it, lengths would not count; here they do."""
    s, t = normal((6, 5), (6, 5))
    lengths = torch.arange(1, 7, dtype=torch.float64)[:, None]
    assert rkd(s * lengths, t).item() != pytest.approx(rkd(s, t).item(), rel=1e-2)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_features_are_the_minimum_0_without_a_gradient(loss, layout):
    s = normal(LAYOUTS[layout][0])[0].requires_grad_()
    value = loss(s, s.detach().clone())
    value.backward()
    assert value.item() == 0.0
    # PKT's 1e-7 under its logarithm moves its minimum by about as much, over B² terms.
    assert s.grad.abs().max() < (1e-8 if loss is pkt else 1e-15)
    other = normal(LAYOUTS[layout][0], seed=1)[0]
    assert loss(s.detach(), other) > 0


@pytest.mark.parametrize("loss", ANY_WIDTH)
def test_the_order_of_the_batch_does_not_matter(loss):
    s, t = normal(*LAYOUTS["maps"])
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(loss(s[order], t[order]), loss(s, t), rtol=1e-12, atol=0)
    # But the student's samples must be the teacher's.
    assert not torch.isclose(loss(s[order], t), loss(s, t), rtol=1e-3)


def test_correlation_of_a_shuffled_batch_is_that_of_all_pairs_on_average():
    s, t = normal((5, 3), (5, 3))
    mean = np.mean(
        [correlation(s[list(o)], t[list(o)]).item() for o in itertools.permutations(range(5))]
    )
    apart = (s - t).abs().numpy()
    pairs = [apart[i] @ apart[j] for i, j in itertools.combinations(range(5), 2)]
    assert mean == pytest.approx(np.mean(pairs), rel=1e-12)


@pytest.mark.parametrize("loss", ANY_WIDTH)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_a_common_scale_changes_nothing(loss, scale):
    s, t = normal(*LAYOUTS["vectors"])
    torch.testing.assert_close(loss(s * scale, t), loss(s, t), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss(s, t * scale), loss(s, t), rtol=1e-10, atol=0)


def test_rkd_ignores_shifts_and_rotations():
    s, t = normal(*LAYOUTS["vectors"])
    rotation = torch.linalg.qr(normal((5, 5), seed=2)[0]).Q
    torch.testing.assert_close(rkd(s @ rotation + 7.0, t), rkd(s, t), rtol=1e-10, atol=0)


def test_pkt_ignores_a_scale_per_sample_and_similarity_does_not():
    s, t = normal(*LAYOUTS["vectors"])
    scales = torch.tensor([0.1, 1, 2, 5, 10, 100], dtype=torch.float64)[:, None]
    torch.testing.assert_close(pkt(s * scales, t), pkt(s, t), rtol=1e-10, atol=0)
    assert not torch.isclose(sp(s * scales, t), sp(s, t), rtol=1e-2)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(loss, layout):
    student, teacher = LAYOUTS[layout]
    s, t = normal(student, student if loss is correlation else teacher)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("case", ["a pair", "all", "dead"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coincident_samples_give_a_bounded_gradient(loss, case, dtype):
    s, t = (x.to(dtype) for x in normal((6, 5), (6, 5)))
    if case == "dead":
        s[1] = 0
    else:
        s[1:] = s[0] if case == "all" else torch.cat([s[:1], s[2:]])
    s.requires_grad_()
    value = loss(s, t)
    value.backward()
    assert value.isfinite()
    # Factors reach 50 and the features have size 1; 1e12 would come from a clamped norm.
    assert s.grad.abs().max() < 1e3


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_batches_are_no_accident(loss, size):
    s, t = normal((size, 5), (size, 5))
    s.requires_grad_()
    value = loss(s, t)
    value.backward()
    assert value.isfinite()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_where_its_products_overflow(loss, dtype):
    s, t = (x.to(dtype) * 5000 for x in normal((4, 8, 5, 5), (4, 8, 5, 5)))
    s.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(s, t)
    value.backward()
    assert value.dtype is torch.float32
    assert value.isfinite()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_autocast_changes_nothing(loss):
    s, t = (x.float() for x in normal((6, 5), (6, 5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(s, t)
    assert torch.equal(inside, loss(s, t))


@pytest.mark.parametrize("loss", ALL)
def test_different_batches_are_refused(loss):
    with pytest.raises(InputError, match=r"\[6, 5\].*\[4, 5\]"):
        loss(*normal((6, 5), (4, 5)))


def test_features_without_a_width_are_refused():
    with pytest.raises(InputError, match=r"features \[6\] have no width"):
        pooled(torch.zeros(6))


def test_correlation_of_different_widths_is_refused():
    with pytest.raises(InputError, match=r"\[6, 5\].*\[6, 9\]"):
        correlation(*normal(*LAYOUTS["vectors"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_correlation_module_embeds_both(layout):
    s, t = normal(*LAYOUTS[layout])
    module = Correlation(tuple(s.shape), tuple(t.shape), embedding=3).double()
    s.requires_grad_()
    value = module(s, t)
    weight = {name: p.detach().numpy() for name, p in module.named_parameters()}
    a, b = (
        torch.from_numpy(
            mean_over_positions(x.detach()) @ weight[f"{who}.weight"].T + weight[f"{who}.bias"]
        )
        for who, x in (("student", s), ("teacher", t))
    )
    assert value.item() == pytest.approx(correlation(a, b).item(), rel=1e-10)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert s.grad.abs().sum() > 0


def test_the_correlation_module_takes_half_features():
    module = Correlation((4, 5), (4, 9))
    assert isinstance(module.student, nn.Linear)
    assert module.student.out_features == module.teacher.out_features == 128
    assert module(torch.randn(4, 5).half(), torch.randn(4, 9).bfloat16()).isfinite()


def test_they_are_losses_of_a_pipeline():
    assert LOSSES["correlation"] is Correlation
    assert all(LOSSES[loss.__name__] is loss for loss in ANY_WIDTH)
    assert not {"pooled", "pooled_width", "unit"} & LOSSES.keys()
