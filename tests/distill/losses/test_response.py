"""Response losses against formulas worked out with numpy, and their invariances."""

import math

import numpy as np
import pytest
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.response import (
    hard_distillation,
    hard_labels,
    jsd,
    logit_standardization,
    multi_label,
    output_regression,
    soft_labels,
    target_regression,
)
from edgekd.errors import InputError

SHAPES = [(5, 7), (3, 4, 6), (4, 2), (2, 1000)]
TEMPERATURES = [1.0, 2.0, 4.0, 20.0]


def logits(shape, seed=0, scale=3.0):
    """Two sets of float64 logits."""
    draw = np.random.default_rng(seed)
    return (torch.from_numpy(draw.normal(0, scale, shape)) for _ in range(2))


def softmax(z):
    """Through exponentials of differences, sample by sample; not the code's log-softmax."""
    return 1 / np.exp(z[..., None, :] - z[..., :, None]).sum(-1)


def test_registry_holds_the_losses_and_nothing_else():
    names = (
        "hard_labels soft_labels hard_distillation output_regression target_regression "
        "logit_standardization jsd "
        "multi_label dkd wsld tf_kd dist mlkd"
    )
    assert set(names.split()) <= LOSSES.keys()
    shared = {"check_same_shape", "kl_divergence", "log_probabilities", "unit_deviation"}
    assert not shared & LOSSES.keys()
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


def test_soft_labels_are_positive_and_independent_of_batch_size():
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
    assert torch.autograd.gradcheck(lambda z: output_regression(z, teacher, kind, mask), student)


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
        + hard_distillation(student, teacher)
        + output_regression(student, teacher)
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
    assert hard_distillation(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_distances_are_their_formulas():
    student, teacher = logits((3, 4, 2))
    difference = (student - teacher).numpy()
    size = np.abs(difference)
    huber = np.where(size < 1, 0.5 * difference**2, size - 0.5)
    kinds = (("mse", difference**2), ("mae", size), ("l1", size), ("huber", huber))
    for kind, expected in kinds:
        assert output_regression(student, teacher, kind).item() == pytest.approx(
            expected.mean(), rel=1e-12
        )
        assert target_regression(student, teacher, kind).item() == pytest.approx(
            expected.mean(), rel=1e-12
        )


def test_a_mask_takes_the_mean_over_what_it_keeps():
    student, teacher = logits((3, 4, 2))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    difference = (student - teacher).numpy()[mask.numpy() == 1]
    assert output_regression(student, teacher, mask=mask).item() == pytest.approx(
        (difference**2).mean(), rel=1e-12
    )
    assert output_regression(student, teacher, mask=torch.ones(3)).item() == pytest.approx(
        output_regression(student, teacher).item(), rel=1e-12
    )
    assert output_regression(student, teacher, mask=torch.zeros(3)).item() == 0.0


@pytest.mark.parametrize(
    "loss",
    [soft_labels, hard_distillation, output_regression, logit_standardization, jsd, multi_label],
)
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(InputError, match=r"\[4, 3\].*\[4, 2\]|\[4, 3\].*\[1, 3\]"):
        loss(torch.zeros(4, 3), torch.zeros(1, 3))


def test_continuous_targets_are_no_labels():
    with pytest.raises(InputError, match="must be integers"):
        hard_labels(torch.zeros(4, 3), torch.zeros(4))


def test_unlabelled_samples_are_left_out_of_the_mean():
    student, _ = logits((6, 4))
    target = torch.tensor([2, -1, 0, -100, 3, -1])
    student.requires_grad_()
    value = hard_labels(student, target, 0.1)
    assert torch.isclose(value, hard_labels(student[[0, 2, 4]], target[[0, 2, 4]], 0.1))
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient[[1, 3, 5]] == 0).all()
    assert (gradient[[0, 2, 4]] != 0).all()


def test_a_batch_without_labels_gives_0_and_can_be_differentiated():
    student, _ = logits((2, 3, 4))
    student.requires_grad_()
    loss = hard_labels(student, torch.full((2, 3), -1), 0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_class_probabilities_are_targets(shape, smoothing):
    student, other = logits(shape)
    mixture = softmax(other.numpy())
    wanted = (1 - smoothing) * mixture + smoothing / shape[-1]
    expected = -(wanted * np.log(softmax(student.numpy()))).sum(-1).mean()
    value = hard_labels(student, torch.from_numpy(mixture), smoothing).item()
    assert value == pytest.approx(expected, rel=1e-10)


def test_probabilities_of_one_class_each_are_its_labels():
    student, _ = logits((5, 7))
    target = torch.tensor([0, 6, 2, 2, 5])
    certain = torch.nn.functional.one_hot(target, 7).to(torch.float16)
    assert torch.isclose(hard_labels(student, certain), hard_labels(student, target))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_standardized_is_the_published_formula(shape, temperature):
    student, teacher = logits(shape)
    rows = []
    for z_s, z_t in zip(
        *(z.numpy().reshape(-1, shape[-1]) for z in (student, teacher)), strict=True
    ):
        # Algorithm 1 of the paper: the standard deviation has 1/C.
        p, q = (softmax((z - z.mean()) / z.std(ddof=0) / temperature) for z in (z_t, z_s))
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    expected = temperature**2 * sum(rows) / len(rows)
    assert logit_standardization(student, teacher, temperature).item() == pytest.approx(
        expected, rel=1e-10, abs=1e-13
    )


def test_standardized_with_the_sample_deviation_is_another_temperature():
    """The authors' code divides by C − 1: the same loss at a larger T, but for its factor T²."""
    student, teacher = logits((6, 5))
    wider = math.sqrt(5 / 4)
    z_student, z_teacher = (
        (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=1, keepdim=True)
        for z in (student, teacher)
    )
    expected = wider**2 * soft_labels(z_student, z_teacher, 2.0)
    assert torch.isclose(logit_standardization(student, teacher, 2.0 * wider), expected, rtol=1e-10)


def test_standardized_knows_no_scale_and_no_shift():
    student, teacher = logits((5, 7))
    scale = torch.tensor([[0.01], [1.0], [3.0], [50.0], [1e4]], dtype=torch.float64)
    before = logit_standardization(student, teacher)
    assert torch.isclose(
        before, logit_standardization(student * scale + 5, teacher / scale), rtol=1e-9
    )
    assert torch.isclose(
        logit_standardization(teacher * scale, teacher), before.new_zeros(()), atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardized_of_a_head_that_starts_at_zero_does_not_explode(dtype):
    """Equal logits have no scale: dividing by a small number would give a gradient of 1e7."""
    _, teacher = logits((4, 10))
    student = torch.full((4, 10), 0.1, dtype=dtype, requires_grad=True)
    loss = logit_standardization(student, teacher.to(dtype))
    loss.backward()
    assert loss > 0
    assert student.grad.abs().max() < 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_published_formula(shape, temperature, beta):
    student, teacher = logits(shape)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    m = beta * p + (1 - beta) * q
    rows = (beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)).sum(-1)
    assert jsd(student, teacher, beta, temperature).item() == pytest.approx(
        temperature**2 * rows.mean(), rel=1e-10
    )


def test_jsd_has_the_two_divergences_as_its_ends():
    student, teacher = logits((5, 7))
    assert torch.isclose(jsd(student, teacher, 0.0, 4.0), soft_labels(student, teacher, 4.0))
    assert torch.isclose(jsd(student, teacher, 1.0, 4.0), soft_labels(teacher, student, 4.0))
    near = 1e-6
    # What is left out is of the relative size β · max(p/q), here some 1e-6 · 1e4.
    forward, reverse = jsd(student, teacher, near) / near, jsd(student, teacher, 1 - near) / near
    assert torch.isclose(forward, jsd(student, teacher, 0.0), rtol=1e-2)
    assert torch.isclose(reverse, jsd(student, teacher, 1.0), rtol=1e-2)


def test_jsd_swaps_its_sides_with_beta_and_is_bounded():
    student, teacher = logits((5, 7), scale=30)
    assert torch.isclose(jsd(student, teacher, 0.3), jsd(teacher, student, 0.7))
    # The entropy of the mixing weights bounds it: ln 2 for a half.
    assert jsd(student, teacher, 0.5) <= math.log(2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_multi_label_is_a_binary_divergence_per_output(shape, temperature):
    student, teacher = logits(shape)
    total = 0.0
    for z_s, z_t in zip(student.numpy().ravel(), teacher.numpy().ravel(), strict=True):
        p, q = (1 / (1 + math.exp(-z / temperature)) for z in (z_t, z_s))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    expected = temperature**2 * total / student.numel()
    # 1 − p for p near 1 loses digits in the loop, not in the loss.
    assert multi_label(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_multi_label_outputs_are_independent():
    student, teacher = logits((5, 7))
    each = [multi_label(student[:, [c]], teacher[:, [c]]) for c in range(7)]
    assert torch.isclose(multi_label(student, teacher), torch.stack(each).mean())
    assert multi_label(student + 1, teacher + 1) != pytest.approx(multi_label(student, teacher))
