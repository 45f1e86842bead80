"""Losses on lists of layers against formulas worked out with numpy, and their invariances."""

import numpy as np
import pytest
import scipy.stats
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.multi_layer import Fsp, Ofd, Review, fsp, ofd, review
from edgekd.errors import InputError

SHAPES = [(3, 2, 8, 6), (3, 4, 4, 6), (3, 5, 4, 3)]
PURE = [fsp, ofd, review]
CLASSES = [Fsp, Ofd, Review]


def layers(shapes=SHAPES, seed=0, scale=1.0):
    """Lists of float64 features of a student and a teacher."""
    draw = np.random.default_rng(seed)
    return tuple(
        [torch.from_numpy(draw.normal(0, scale, shape)) for shape in shapes] for _ in range(2)
    )


def test_the_registry_has_the_trained_classes():
    assert [LOSSES[name] for name in ("fsp", "ofd", "review")] == CLASSES


def largest_of_blocks(feature, height, width):
    c, h, w = feature.shape
    return feature.reshape(c, height, h // height, width, w // width).max(axis=(2, 4))


def test_fsp_is_the_published_formula():
    student, teacher = layers()
    total = 0.0
    for first, second in ((0, 1), (1, 2)):
        height, width = (min(SHAPES[first][d], SHAPES[second][d]) for d in (2, 3))
        squares = []
        for sample in range(3):
            grams = []
            for side in (student, teacher):
                x, y = (
                    largest_of_blocks(side[layer][sample].numpy(), height, width)
                    for layer in (first, second)
                )
                gram = np.zeros((len(x), len(y)))
                for i, j in np.ndindex(*gram.shape):
                    gram[i, j] = sum((x[i] * y[j]).ravel()) / (height * width)
                grams.append(gram)
            squares.append((grams[0] - grams[1]) ** 2)
        total += np.mean(squares)
    assert fsp(student, teacher).item() == pytest.approx(total, rel=1e-10)


def test_fsp_compares_channels_and_needs_no_equal_sizes():
    student, _ = layers([(3, 2, 4, 3), (3, 4, 4, 3), (3, 5, 4, 3)])
    teacher = [f.repeat_interleave(2, 2).repeat_interleave(3, 3) for f in student]
    assert fsp(student, teacher).item() == pytest.approx(0, abs=1e-14)


def test_ofd_is_the_published_formula():
    student, teacher = layers()
    total = 0.0
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        s, t = s.numpy(), t.numpy()
        layer = 0.0
        for channel in range(s.shape[1]):
            values = t[:, channel]
            margin = values[values < 0].mean()
            for a, b in zip(s[:, channel].ravel(), values.ravel(), strict=True):
                b = max(b, margin)
                layer += 0.0 if a <= b <= 0 else (b - a) ** 2
        total += layer / len(s) / 2 ** (len(student) - index - 1)
    assert ofd(student, teacher).item() == pytest.approx(total, rel=1e-10)


def test_ofd_margin_is_what_the_teachers_batch_norm_would_give():
    """E[x | x < 0] of a normal density: the margin of the paper, with shift 0.5 and scale 2."""
    shift, scale = 0.5, 2.0
    normal = scipy.stats.truncnorm(-np.inf, -shift / scale, loc=shift, scale=scale)
    draw = np.random.default_rng(0)
    teacher = torch.from_numpy(draw.normal(shift, scale, (64, 1, 32, 32)))
    # A student below every target pays for the positive ones only; raised to 0 where the teacher
    # is lowest, it also pays the squared distance from there to the margin.
    below = torch.full_like(teacher, -10.0)
    raised = torch.where(teacher == teacher.min(), 0.0, below)
    squared = (ofd([raised], [teacher]) - ofd([below], [teacher])) * len(teacher)
    # The deviation of the negative values, 1, over the root of their number, 26000.
    assert -squared.sqrt().item() == pytest.approx(normal.mean(), abs=5 * 0.007)


def test_ofd_leaves_what_a_relu_makes_equal():
    """Where student and teacher are both negative and the student is lower, the loss is zero."""
    _, teacher = layers()
    teacher = [f - 10 for f in teacher]
    student = [(f - 20).requires_grad_() for f in teacher]
    loss = ofd(student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert all(f.grad.abs().max() == 0 for f in student)


def test_ofd_of_a_teacher_without_negative_values_needs_no_margin():
    student, teacher = layers()
    teacher = [f.abs() + 0.1 for f in teacher]
    expected = sum(
        (s - t).square().sum().item() / len(s) / 2 ** (2 - i)
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    )
    assert ofd(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_review_is_the_published_formula():
    shapes = [(2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 2, 2), (2, 3, 1, 1)]
    levels = [[8, 4, 2, 1], [4, 2, 1], [2, 1], [1]]
    student, teacher = layers(shapes)
    total = 0.0
    for s, t, sizes in zip(student, teacher, levels, strict=True):
        value = 0.0
        for k, size in enumerate(sizes):
            pooled = [
                f.numpy().reshape(2, 3, size, f.shape[2] // size, size, f.shape[3] // size)
                for f in (s, t)
            ]
            difference = pooled[0].mean((3, 5)) - pooled[1].mean((3, 5))
            value += (difference**2).mean() / 2**k
        total += value / sum(1 / 2**k for k in range(len(sizes)))
    assert review(student, teacher).item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("loss", PURE)
def test_the_order_of_the_samples_changes_nothing(loss):
    student, teacher = layers()
    order = torch.tensor([2, 0, 1])
    mixed = loss([f[order] for f in student], [f[order] for f in teacher])
    torch.testing.assert_close(mixed, loss(student, teacher), rtol=1e-12, atol=0)
    assert abs(loss([f[order] for f in student], teacher) - loss(student, teacher)) > 1e-6


@pytest.mark.parametrize("loss", PURE)
def test_identical_features_are_the_minimum(loss):
    student, other = layers()
    student = [f.abs().requires_grad_() for f in student]
    teacher = [f.detach().clone() for f in student]
    least = loss(student, teacher)
    least.backward()
    assert least.item() == 0
    assert all(f.grad is None or f.grad.abs().max() == 0 for f in student)
    assert loss([f + 0.1 * o for f, o in zip(student, other, strict=True)], teacher) > 0


@pytest.mark.parametrize("loss", PURE)
def test_gradients(loss):
    student, teacher = layers([(2, 2, 4, 4), (2, 3, 2, 3)])
    student = [f.requires_grad_() for f in student]
    assert torch.autograd.gradcheck(lambda *s: loss(list(s), teacher), tuple(student))


@pytest.mark.parametrize("loss", PURE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_it_overflows(loss, dtype):
    student, teacher = ([f.clamp(-6e4, 6e4).to(dtype) for f in s] for s in layers(scale=2e4))
    value = loss(student, teacher)
    exact = loss([f.double() for f in student], [f.double() for f in teacher])
    assert value.dtype is torch.float32
    # The rounding of float32 over some hundred summands.
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("loss", PURE)
def test_shapes_that_would_broadcast_are_refused_and_named(loss):
    student, teacher = layers()
    teacher[1] = teacher[1][:, :1]
    with pytest.raises(InputError, match=r"student \[3, .*\] and teacher \[3, .*\] differ"):
        loss(student, teacher)
    teacher[1] = teacher[1][:, 0, 0]
    with pytest.raises(InputError, match=r"\[3, 4, 4, 6\] and teacher \[3, 6\]"):
        loss(student, teacher)


@pytest.mark.parametrize("loss", [*PURE, *CLASSES])
def test_lists_of_different_length_are_refused(loss):
    student, teacher = layers()
    if isinstance(loss, type):
        student, teacher = ([tuple(f.shape) for f in side] for side in (student, teacher))
    with pytest.raises(InputError, match="3 layers of the student and 2 of the teacher"):
        loss(student, teacher[:2])
    with pytest.raises(InputError, match="0 layers"):
        loss([], [])


@pytest.mark.parametrize("loss", [fsp, Fsp])
def test_one_layer_has_no_flow(loss):
    with pytest.raises(InputError, match="at least 2"):
        loss([torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 1, 1, 1)])
