"""Losses over a batch of predictions, against loops and numpy's own correlation."""

import numpy as np
import pytest
import torch

from edgekd.distill.losses.response import dist, mlkd
from edgekd.errors import InputError
from edgekd.extension import check_arguments

SHAPES = [(5, 7), (3, 4, 6), (4, 2), (3, 1000)]


def logits(shape, seed=0, scale=2.0):
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(draw.normal(0, scale, shape)) for _ in range(2)]


def probabilities(z, temperature):
    rows = z.numpy().reshape(-1, z.shape[-1]) / temperature
    powers = np.exp(rows)
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_dist_is_the_published_formula(shape, temperature):
    student, teacher = logits(shape)
    q, p = probabilities(student, temperature), probabilities(teacher, temperature)
    rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
    columns = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
    expected = temperature**2 * (0.5 * np.mean(rows) + 3 * np.mean(columns))
    assert dist(student, teacher, 0.5, 3.0, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_dist_asks_for_linear_agreement_only():
    """Rows of probabilities that are an affine image of the teacher's already match."""
    _, teacher = logits((6, 5))
    p = teacher.softmax(-1)
    flatter = (0.5 * p + 0.1).log()
    assert dist(flatter, teacher).item() == pytest.approx(0, abs=1e-12)
    assert dist(-teacher, teacher) > 1


def test_the_column_relation_is_the_row_relation_of_the_transpose():
    """On doubly stochastic matrices, whose transpose consists of probabilities too."""
    circulant = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7]]).double()
    other = torch.tensor([[0.1, 0.3, 0.6], [0.6, 0.1, 0.3], [0.3, 0.6, 0.1]]).double()
    columns = dist(circulant.log(), other.log(), 0.0, 1.0)
    rows = dist(circulant.T.log(), other.T.log(), 1.0, 0.0)
    assert torch.isclose(columns, rows, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_of_a_head_that_starts_at_zero_does_not_explode(dtype):
    """Constant rows and columns correlate with nothing: 1 each, and no gradient of 1e8."""
    _, teacher = logits((4, 10))
    student = torch.full((4, 10), 0.1, dtype=dtype, requires_grad=True)
    loss = dist(student, teacher.to(dtype))
    loss.backward()
    assert loss.item() == 2.0
    assert (student.grad == 0).all()


def test_a_single_sample_has_rows_only():
    student, teacher = logits((1, 5))
    student.requires_grad_()
    loss = dist(student, teacher, gamma=1.0)
    assert torch.isclose(loss, dist(student, teacher, gamma=0.0) + 1)
    loss.backward()
    assert student.grad.isfinite().all()


def test_dist_finds_the_relation_of_improbable_classes():
    """A class of 1e-6 has columns that a constant in the denominator would make unrelated."""
    _, teacher = logits((6, 4), scale=0.5)
    teacher[:, 3] -= 14
    assert dist(teacher.float(), teacher.float()).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (4, 2)])
def test_mlkd_is_the_published_formula(shape):
    student, teacher = logits(shape)
    temperatures = (2.0, 5.0)
    expected = 0.0
    for temperature in temperatures:
        q, p = probabilities(student, temperature), probabilities(teacher, temperature)
        samples, classes = p.shape
        expected += temperature**2 * (p * np.log(p / q)).sum() / samples
        for i in range(classes):
            for j in range(classes):
                expected += (p[:, i] @ p[:, j] - q[:, i] @ q[:, j]) ** 2 / classes
        for i in range(samples):
            for j in range(samples):
                expected += (p[i] @ p[j] - q[i] @ q[j]) ** 2 / samples
    assert mlkd(student, teacher, temperatures).item() == pytest.approx(expected, rel=1e-10)


def test_mlkd_sums_over_temperatures():
    student, teacher = logits((5, 7))
    each = [mlkd(student, teacher, (t,)) for t in (2, 3, 4, 5, 6)]
    assert torch.isclose(mlkd(student, teacher), torch.stack(each).sum())


def test_mlkd_takes_a_list_from_yaml_and_refuses_none():
    given = check_arguments(
        mlkd, {"temperatures": [1, 4.5]}, supplied=("student", "teacher"), name="mlkd"
    )
    assert given == {"temperatures": (1.0, 4.5)}
    for wrong in ([], [4, 0.5], 4):
        with pytest.raises(InputError):
            check_arguments(
                mlkd, {"temperatures": wrong}, supplied=("student", "teacher"), name="mlkd"
            )


@pytest.mark.parametrize("loss", [dist, mlkd])
def test_shapes_that_would_broadcast_are_refused(loss):
    student, teacher = logits((5, 4))
    with pytest.raises(InputError, match=r"\[5, 4\].*\[1, 4\]"):
        loss(student, teacher[:1])
