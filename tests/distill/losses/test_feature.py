"""Losses on one pair of features against formulas worked out with numpy, and their invariances."""

import numpy as np
import pytest
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.feature import (
    attention,
    cwd,
    fitnets,
    nst,
    pkd,
    vid,
)
from edgekd.errors import InputError

MAPS = (3, 4, 5, 6)


def with_variance(student, teacher):
    return vid(student, teacher, torch.linspace(0.5, 2, teacher.shape[1]).to(teacher))


PURE = [fitnets, attention, nst, with_variance, cwd, pkd]
AT_LEAST_0 = [fitnets, attention, nst, cwd, pkd]
ANY_CHANNELS = [attention, nst]


def features(student=MAPS, teacher=MAPS, seed=0, scale=1.0):
    """Two float64 features."""
    draw = np.random.default_rng(seed)
    return (torch.from_numpy(draw.normal(0.3, scale, shape)) for shape in (student, teacher))


def test_the_registry_has_the_trained_class_where_there_is_one():
    for name in ("fitnets", "vid", "cwd", "pkd"):
        assert isinstance(LOSSES[name], type), name
    assert LOSSES["attention"] is attention
    assert LOSSES["nst"] is nst


@pytest.mark.parametrize("shape", [MAPS, (3, 5, 4), (3, 7)])
def test_fitnets_is_the_published_formula(shape):
    student, teacher = features(shape, shape)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = sum((s - t) ** 2 for s, t in pairs) / student.numel()
    assert fitnets(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def blocks(feature, height, width):
    """Averages of equal blocks."""
    b, c, h, w = feature.shape
    return feature.reshape(b, c, height, h // height, width, w // width).mean((3, 5))


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("student", "teacher"), [(MAPS, MAPS), ((3, 4, 4, 6), (3, 9, 8, 3))])
def test_attention_is_the_published_formula(student, teacher, power):
    student, teacher = features(student, teacher)
    size = tuple(np.minimum(student.shape[2:], teacher.shape[2:]))
    maps = []
    for feature in (student, teacher):
        summed = (np.abs(blocks(feature.numpy(), *size)) ** power).mean(1)
        maps.append([a / np.sqrt((a**2).sum()) for a in summed])
    expected = np.mean([(s - t) ** 2 for s, t in zip(*maps, strict=True)])
    assert attention(student, teacher, power).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("student", "teacher"), [(MAPS, MAPS), ((3, 4, 4, 6), (3, 9, 8, 3))])
def test_nst_is_the_published_formula(student, teacher):
    student, teacher = features(student, teacher)
    size = tuple(np.minimum(student.shape[2:], teacher.shape[2:]))
    total = 0.0
    for s, t in zip(blocks(student.numpy(), *size), blocks(teacher.numpy(), *size), strict=True):
        sets = [[c.ravel() / np.linalg.norm(c) for c in channels] for channels in (s, t)]

        def kernel(one, other):
            return np.mean([[np.dot(x, y) ** 2 for y in other] for x in one])

        total += kernel(sets[0], sets[0]) + kernel(sets[1], sets[1]) - 2 * kernel(*sets)
    # Three kernels of size 1 that nearly cancel: an absolute rounding of 1e-15.
    assert nst(student, teacher).item() == pytest.approx(total / 3, rel=1e-10, abs=1e-14)


def test_nst_is_the_distance_of_the_two_gram_matrices_over_positions():
    """Another form of the same: the kernel's feature map of x is the outer product x xᵀ."""
    student, teacher = features(MAPS, (3, 9, 5, 6))
    grams = []
    for feature in (student, teacher):
        rows = torch.nn.functional.normalize(feature.flatten(2), dim=2)
        grams.append(rows.mT @ rows / feature.shape[1])
    expected = (grams[0] - grams[1]).square().sum((1, 2)).mean()
    torch.testing.assert_close(nst(student, teacher), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [MAPS, (3, 5, 4), (3, 4)])
def test_vid_is_the_published_formula_with_a_variance_per_channel(shape):
    student, teacher = features(shape, shape)
    variance = np.array([0.1, 0.5, 2.0, 5.0])
    total = 0.0
    for index in np.ndindex(*shape):
        sigma2 = variance[index[1] if len(shape) == 4 else index[-1]]
        error = float(student[index] - teacher[index])
        total += 0.5 * (error**2 / sigma2 + np.log(sigma2))
    value = vid(student, teacher, torch.from_numpy(variance)).item()
    assert value == pytest.approx(total / student.numel(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_wise_is_the_published_formula(temperature):
    student, teacher = features(scale=2.0)
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        for channel in range(MAPS[1]):
            q, p = (np.exp(f[channel].ravel() / temperature) for f in (s, t))
            p, q = p / p.sum(), q / q.sum()
            total += (p * np.log(p / q)).sum()
    expected = temperature**2 * total / (MAPS[0] * MAPS[1])
    assert cwd(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_pkd_is_one_minus_the_pearson_correlation_of_each_channel():
    student, teacher = features()
    correlations = [
        np.corrcoef(student[:, c].numpy().ravel(), teacher[:, c].numpy().ravel())[0, 1]
        for c in range(MAPS[1])
    ]
    # The 1e-12 against a variance of 1.
    assert pkd(student, teacher).item() == pytest.approx(1 - np.mean(correlations), rel=1e-10)


def test_pkd_reaches_from_0_to_2():
    student, _ = features()
    assert pkd(student, 5 * student + 3).item() == pytest.approx(0, abs=1e-11)
    assert pkd(student, -student).item() == pytest.approx(2, rel=1e-11)


@pytest.mark.parametrize("loss", [attention, nst])
def test_only_where_a_feature_is_large_matters_and_not_how_large(loss):
    student, teacher = features(MAPS, (3, 9, 5, 6))
    before = loss(student, teacher)
    torch.testing.assert_close(loss(1e3 * student, 1e-3 * teacher), before, rtol=1e-9, atol=1e-14)


def test_channel_wise_ignores_a_shift_of_a_channel():
    student, teacher = features()
    shift = torch.arange(4, dtype=torch.float64)[:, None, None] * 10
    before = cwd(student, teacher)
    torch.testing.assert_close(cwd(student + shift, teacher), before, rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", ANY_CHANNELS)
def test_the_order_of_the_channels_is_no_part_of_these(loss):
    student, teacher = features(MAPS, (3, 9, 5, 6))
    shuffled = teacher[:, torch.randperm(9)]
    torch.testing.assert_close(
        loss(student, shuffled), loss(student, teacher), rtol=1e-10, atol=1e-14
    )
    assert loss(teacher, shuffled).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("loss", PURE)
def test_the_order_of_the_samples_changes_nothing(loss):
    student, teacher = features()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        loss(student[order], teacher[order]), loss(student, teacher), rtol=1e-12, atol=1e-14
    )
    # And pairing a student with another sample's teacher does change it.
    assert abs(loss(student[order], teacher) - loss(student, teacher)) > 1e-4


@pytest.mark.parametrize("loss", PURE)
def test_identical_features_are_the_minimum(loss):
    student, _ = features()
    teacher = student.clone()
    student.requires_grad_()
    least = loss(student, teacher)
    least.backward()
    # Normalisations leave the rounding of float64.
    assert student.grad.abs().max() < 1e-13
    if loss in AT_LEAST_0:
        assert least.item() == pytest.approx(0, abs=1e-14)
    for seed in range(10):
        other, _ = features(seed=seed + 1)
        assert loss(student + 0.1 * other, teacher) > least + 1e-9


@pytest.mark.parametrize("loss", PURE)
def test_gradients(loss):
    student, teacher = features((2, 3, 3, 2), (2, 3, 3, 2))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


@pytest.mark.parametrize("loss", ANY_CHANNELS)
@pytest.mark.parametrize("teacher", [(2, 5, 2, 2), (2, 2, 8, 5)])
def test_gradients_through_other_channels_and_sizes(loss, teacher):
    student, teacher = features((2, 3, 4, 4), teacher)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


def test_the_gradient_of_the_variance():
    student, teacher = features((2, 3, 2, 2), (2, 3, 2, 2))
    variance = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: vid(student, teacher, v), variance)


@pytest.mark.parametrize("loss", PURE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_at_its_extremes_and_near_float64(loss, dtype):
    student, teacher = features(scale=2e4)
    student, teacher = (f.clamp(-6e4, 6e4).to(dtype) for f in (student, teacher))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype is torch.float32
    # Widening first: what is left is the rounding of float32.
    exact = loss(student.double(), teacher.double()).item()
    assert value.item() == pytest.approx(exact, rel=1e-4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", PURE)
def test_features_that_are_all_zero_have_a_finite_gradient(loss):
    student = torch.zeros(MAPS, requires_grad=True)
    _, teacher = features()
    loss(student, teacher.float()).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [fitnets, with_variance, cwd, pkd])
@pytest.mark.parametrize("teacher", [(3, 1, 5, 6), (1, 4, 5, 6), (3, 4, 5, 1)])
def test_shapes_that_would_broadcast_are_refused_and_named(loss, teacher):
    with pytest.raises(InputError) as error:
        loss(torch.zeros(MAPS), torch.zeros(teacher))
    assert str(list(MAPS)) in error.value.what
    assert str(list(teacher)) in error.value.what


@pytest.mark.parametrize("loss", [attention, nst, cwd, pkd])
@pytest.mark.parametrize("teacher", [(3, 4), (3, 4, 5), (2, 4, 5, 6)])
def test_only_maps_of_the_same_samples_are_taken(loss, teacher):
    with pytest.raises(InputError) as error:
        loss(torch.zeros(MAPS), torch.zeros(teacher))
    assert str(list(MAPS)) in error.value.what
    assert str(list(teacher)) in error.value.what
