"""Response losses against formulas worked out with numpy, and their invariances."""

import numpy as np
import pytest
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.response import (
    hard_labels,
    hard_targets,
    regression,
    soft_labels,
    teacher_labels,
)
from edgekd.errors import InputError

SHAPES = [(5, 7), (3, 4, 6), (4, 2)]
TEMPERATURES = [1.0, 2.0, 4.0, 20.0]


def logits(shape, seed=0, scale=3.0):
    """Two sets of float64 logits."""
    draw = np.random.default_rng(seed)
    return (torch.from_numpy(draw.normal(0, scale, shape)) for _ in range(2))


def softmax(z):
    """Through exponentials of differences, sample by sample; not the code's log-softmax."""
    return 1 / np.exp(z[..., None, :] - z[..., :, None]).sum(-1)


def test_registry_holds_the_losses_and_nothing_else():
    names = {"hard_labels", "soft_labels", "teacher_labels", "regression", "hard_targets"}
    assert names <= LOSSES.keys()
    assert all(not name.startswith("_") for name in LOSSES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_labels_are_the_published_formula(shape, temperature):
    student, teacher = logits(shape)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    rows = (p * np.log(p / q)).reshape(-1, shape[-1])
    expected = temperature**2 * sum(row.sum() for row in rows) / len(rows)
    # float64 on both sides: only rounding may differ.
    assert soft_labels(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_soft_labels_are_teacher_to_student_and_not_the_reverse():
    student, teacher = logits((6, 5))
    assert soft_labels(student, teacher).item() != pytest.approx(
        soft_labels(teacher, student).item(), rel=1e-3
    )
    # A student that misses a class the teacher believes in pays; the reverse costs little.
    misses, believes = torch.tensor([[0.0, -20.0]]), torch.tensor([[0.0, 0.0]])
    assert soft_labels(misses, believes, 1.0) > 10 * soft_labels(believes, misses, 1.0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_labels_ignore_a_shift_per_sample(temperature):
    student, teacher = logits((5, 7))
    shift = torch.arange(5, dtype=torch.float64)[:, None] * 100
    before = soft_labels(student, teacher, temperature)
    after = soft_labels(student + shift, teacher - 2 * shift, temperature)
    # Logits of size 1000 carry a relative rounding of 1e-13.
    assert torch.isclose(before, after, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_labels_of_equal_logits_are_exactly_0_with_no_gradient(shape, temperature):
    student, _ = logits(shape)
    student.requires_grad_()
    loss = soft_labels(student, student.detach().clone(), temperature)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15


def test_soft_labels_are_never_negative_and_do_not_depend_on_the_batch_size():
    student, teacher = logits((64, 10))
    each = torch.stack(
        [soft_labels(s[None], t[None]) for s, t in zip(student, teacher, strict=True)]
    )
    assert (each > 0).all()
    assert torch.isclose(soft_labels(student, teacher), each.mean(), rtol=1e-12)


def test_the_gradient_keeps_its_size_over_temperatures():
    """Why T² is there: for high T the gradient tends to (z_s − z_t)/C, whatever T is."""
    student, teacher = logits((4, 6), scale=0.1)
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    for temperature in (10.0, 20.0):
        leaf = student.clone().requires_grad_()
        soft_labels(leaf, teacher, temperature).backward()
        assert leaf.grad is not None
        # First order in z/T = 0.1/10: what is left out is of that relative size.
        torch.testing.assert_close(leaf.grad * 4, (student - teacher) / 6, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_labels_gradient(shape, temperature):
    student, teacher = logits(shape)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: soft_labels(z, teacher, temperature), student)


@pytest.mark.parametrize("kind", ["mse", "mae", "huber"])
def test_regression_gradient_with_a_mask(kind):
    student, teacher = logits((3, 4, 2))
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    assert torch.autograd.gradcheck(lambda z: regression(z, teacher, kind, mask), student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_half_precision_is_finite_at_its_extremes(dtype, temperature):
    largest = 6e4
    student = torch.tensor([[largest, -largest, 0.0], [1.0, 2.0, 3.0]], dtype=dtype)
    teacher = torch.tensor([[-largest, largest, 0.0], [3.0, 2.0, 1.0]], dtype=dtype)
    student.requires_grad_()
    target = torch.tensor([1, 0])
    loss = (
        soft_labels(student, teacher, temperature)
        + hard_labels(student, target)
        + teacher_labels(student, teacher)
        + regression(student, teacher)
    )
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype is torch.float32
    assert student.grad is not None
    assert soft_labels(student, teacher, temperature).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_float64(dtype):
    student, teacher = logits((8, 10))
    exact = soft_labels(student, teacher, 4.0).item()
    # Only the rounding of the logits themselves (2^-8 for bfloat16) may show.
    half = soft_labels(student.to(dtype), teacher.to(dtype), 4.0).item()
    assert half == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_labels_are_the_published_formula(shape, smoothing):
    student, _ = logits(shape)
    target = np.random.default_rng(1).integers(0, shape[-1], shape[:-1])
    wanted = (1 - smoothing) * np.eye(shape[-1])[target] + smoothing / shape[-1]
    expected = -(wanted * np.log(softmax(student.numpy()))).sum(-1).mean()
    value = hard_labels(student, torch.from_numpy(target), smoothing).item()
    assert value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_teacher_labels_are_hard_labels_of_its_decision(shape):
    student, teacher = logits(shape)
    chosen = np.argmax(teacher.numpy(), -1)
    probabilities = np.take_along_axis(softmax(student.numpy()), chosen[..., None], -1)
    expected = -np.log(probabilities).mean()
    assert teacher_labels(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_distances_are_their_formulas():
    student, teacher = logits((3, 4, 2))
    difference = (student - teacher).numpy()
    size = np.abs(difference)
    huber = np.where(size < 1, 0.5 * difference**2, size - 0.5)
    for kind, expected in (("mse", difference**2), ("mae", size), ("huber", huber)):
        assert regression(student, teacher, kind).item() == pytest.approx(
            expected.mean(), rel=1e-12
        )
        assert hard_targets(student, teacher, kind).item() == pytest.approx(
            expected.mean(), rel=1e-12
        )


def test_a_mask_takes_the_mean_over_what_it_keeps():
    student, teacher = logits((3, 4, 2))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    difference = (student - teacher).numpy()[mask.numpy() == 1]
    assert regression(student, teacher, mask=mask).item() == pytest.approx(
        (difference**2).mean(), rel=1e-12
    )
    assert regression(student, teacher, mask=torch.ones(3)).item() == pytest.approx(
        regression(student, teacher).item(), rel=1e-12
    )
    assert regression(student, teacher, mask=torch.zeros(3)).item() == 0.0


@pytest.mark.parametrize("loss", [soft_labels, teacher_labels, regression])
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(InputError, match=r"\[4, 3\].*\[4, 2\]|\[4, 3\].*\[1, 3\]"):
        loss(torch.zeros(4, 3), torch.zeros(1, 3))


def test_continuous_targets_are_no_labels():
    with pytest.raises(InputError, match="must be integers"):
        hard_labels(torch.zeros(4, 3), torch.zeros(4))
