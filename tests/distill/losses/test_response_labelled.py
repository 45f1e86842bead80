"""Losses that use the label, against loops over samples and classes."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from edgekd.distill.losses.response import dkd, soft_labels, tf_kd, wsld
from edgekd.errors import InputError
from tests.distill.losses.samples import logits_and_classes

SHAPES = [(5, 7), (3, 4, 6), (4, 2), (2, 1000)]
TEMPERATURES = [1.0, 2.0, 4.0, 20.0]


def rows_of(student, teacher, target):
    classes = student.shape[-1]
    return zip(
        student.reshape(-1, classes).tolist(),
        teacher.reshape(-1, classes).tolist(),
        target.reshape(-1).tolist(),
        strict=True,
    )


def softmax(z, temperature):
    powers = [math.exp(value / temperature) for value in z]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def without(values, index):
    return [value for i, value in enumerate(values) if i != index]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dkd_is_the_published_formula(shape, temperature):
    student, teacher, target = logits_and_classes(shape)
    rows = []
    for z_s, z_t, y in rows_of(student, teacher, target):
        p, q = softmax(z_t, temperature), softmax(z_s, temperature)
        of_target = kl([p[y], sum(without(p, y))], [q[y], sum(without(q, y))])
        of_others = kl(softmax(without(z_t, y), temperature), softmax(without(z_s, y), temperature))
        rows.append(0.5 * of_target + 3 * of_others)
    value = dkd(student, teacher, target, 0.5, 3.0, temperature).item()
    assert value == pytest.approx(temperature**2 * mean(rows), rel=1e-10)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_labels_are_dkd_with_the_teachers_doubt_as_beta(temperature):
    """Section 3.1 of the paper: KL = TCKD + (1 − p_y) · NCKD, here sample by sample."""
    for z_s, z_t, y in zip(*logits_and_classes((6, 5)), strict=True):
        doubt = 1 - (z_t / temperature).softmax(-1)[y].item()
        one = dkd(z_s[None], z_t[None], y[None], 1.0, doubt, temperature)
        assert torch.isclose(one, soft_labels(z_s, z_t, temperature), rtol=1e-10)


def test_dkd_keeps_the_doubt_of_a_certain_teacher():
    """In float32 a right class 60 above the others has probability 1 exactly; its log has not."""
    teacher = torch.tensor([[60.0, 0.0, 1.0]])
    student = torch.tensor([[0.0, 2.0, 0.0]], requires_grad=True)
    target = torch.tensor([0])
    value = dkd(student, teacher, target, temperature=1.0)
    exact = dkd(student.double(), teacher.double(), target, temperature=1.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    value.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_wsld_is_the_published_formula(shape, temperature):
    student, teacher, target = logits_and_classes(shape)
    rows = []
    for z_s, z_t, y in rows_of(student, teacher, target):
        weight = 1 - math.exp(-math.log(softmax(z_s, 1)[y]) / math.log(softmax(z_t, 1)[y]))
        p, q = softmax(z_t, temperature), softmax(z_s, temperature)
        rows.append(-weight * sum(a * math.log(b) for a, b in zip(p, q, strict=True)))
    # log p near p = 1 loses digits in the loop, not in the loss.
    value = wsld(student, teacher, target, temperature).item()
    assert value == pytest.approx(temperature**2 * mean(rows), rel=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_wsld_weights_are_no_path_for_gradients(temperature):
    student, teacher, target = logits_and_classes((5, 7))
    student.requires_grad_()
    wsld(student, teacher, target, temperature).backward()
    for row, (z_s, z_t, y) in enumerate(rows_of(student, teacher, target)):
        weight = 1 - math.exp(-math.log(softmax(z_s, 1)[y]) / math.log(softmax(z_t, 1)[y]))
        p, q = softmax(z_t, temperature), softmax(z_s, temperature)
        # d/dz of T²·H is T·(q − p).
        expected = [weight * temperature * (b - a) / 5 for a, b in zip(p, q, strict=True)]
        assert student.grad[row].tolist() == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_wsld_weighs_a_sample_less_where_the_student_is_ahead():
    teacher = torch.tensor([[1.0, 0.0, 0.0]])
    target = torch.tensor([0])
    behind, ahead = torch.tensor([[-3.0, 0.0, 0.0]]), torch.tensor([[9.0, 0.0, 0.0]])
    weights = [
        wsld(z, teacher, target, 1.0) / -(teacher.softmax(-1) * z.log_softmax(-1)).sum()
        for z in (ahead, teacher, behind)
    ]
    assert weights[0] < 0.01
    assert weights[1].item() == pytest.approx(1 - math.exp(-1), rel=1e-6)
    assert weights[2] > 0.99


@pytest.mark.parametrize("student", [[200.0, 0.0], [0.0, 200.0]])
def test_wsld_of_a_teacher_without_any_loss_is_finite(student):
    """CE_t = 0 in float32: a ratio of 0/0 or 1/0."""
    z_s = torch.tensor([student], requires_grad=True)
    loss = wsld(z_s, torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite()
    assert z_s.grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_virtual_teacher_is_softened_and_always_right(shape, temperature):
    student, _, target = logits_and_classes(shape)
    classes, correct = shape[-1], 0.9
    rows = []
    for z_s, _, y in rows_of(student, student, target):
        p = [correct if k == y else (1 - correct) / (classes - 1) for k in range(classes)]
        softened = [a ** (1 / temperature) for a in p]
        softened = [a / sum(softened) for a in softened]
        rows.append(kl(softened, softmax(z_s, temperature)))
    value = tf_kd(student, target, correct, temperature).item()
    assert value == pytest.approx(temperature**2 * mean(rows), rel=1e-10)


def test_virtual_teacher_at_temperature_1_is_label_smoothing():
    """Up to a constant; smoothing that spreads ε over all C classes leaves 1 − ε + ε/C."""
    student, _, target = logits_and_classes((5, 4))
    student.requires_grad_()
    smoothing = 0.2
    (one,) = torch.autograd.grad(tf_kd(student, target, 0.85, 1.0), student)
    smoothed = torch.nn.functional.cross_entropy(student, target, label_smoothing=smoothing)
    (other,) = torch.autograd.grad(smoothed, student)
    torch.testing.assert_close(one, other)


LOSSES = {
    "dkd": dkd,
    "wsld": wsld,
    "tf_kd": lambda s, t, y: tf_kd(s, y),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_unlabelled_samples_are_left_out_of_the_mean(loss):
    student, teacher, target = logits_and_classes((6, 4))
    unlabelled = torch.tensor([1, 3, 5])
    labelled = torch.tensor([0, 2, 4])
    target[unlabelled] = torch.tensor([-1, -100, -1])
    student.requires_grad_()
    value = loss(student, teacher, target)
    assert torch.isclose(value, loss(student[labelled], teacher[labelled], target[labelled]))
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient[unlabelled] == 0).all()
    assert (gradient[labelled] != 0).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_batch_without_labels_gives_0_and_can_be_differentiated(loss):
    student, teacher, _ = logits_and_classes((2, 3, 4))
    student.requires_grad_()
    value = loss(student, teacher, torch.full((2, 3), -1))
    value.backward()
    assert value.item() == 0.0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_targets_that_name_no_class_are_refused(loss):
    student, teacher, target = logits_and_classes((5, 4))
    with pytest.raises(InputError, match="mixup and cutmix give mixtures"):
        loss(student, teacher, one_hot(target, 4).double())
    with pytest.raises(InputError, match="must be integers"):
        loss(student, teacher, target.double())
    with pytest.raises(InputError, match=r"\[5, 4\] do not fit labels \[4\]"):
        loss(student, teacher, target[:4])


@pytest.mark.parametrize("loss", [dkd, wsld])
def test_shapes_that_would_broadcast_are_refused(loss):
    student, teacher, target = logits_and_classes((5, 4))
    with pytest.raises(InputError, match=r"\[5, 4\].*\[1, 4\]"):
        loss(student, teacher[:1], target)
