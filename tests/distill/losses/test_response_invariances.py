"""What every response loss must leave unchanged, and where it must be 0."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.distill.losses.response import (
    dist,
    dkd,
    hard_distillation,
    hard_labels,
    jsd,
    logit_standardization,
    mlkd,
    multi_label,
    output_regression,
    soft_labels,
    tf_kd,
    wsld,
)
from tests.distill.losses.samples import logits_and_classes

DIVERGENCES = {
    "soft_labels": lambda s, t, y: soft_labels(s, t),
    "logit_standardization": lambda s, t, y: logit_standardization(s, t),
    "jsd": lambda s, t, y: jsd(s, t),
    "jsd forward": lambda s, t, y: jsd(s, t, 0.0),
    "jsd near forward": lambda s, t, y: jsd(s, t, 0.01),
    "jsd reverse": lambda s, t, y: jsd(s, t, 1.0),
    "multi_label": lambda s, t, y: multi_label(s, t),
    "dkd": lambda s, t, y: dkd(s, t, y),
    "dist": lambda s, t, y: dist(s, t),
    "mlkd": lambda s, t, y: mlkd(s, t),
    "mse": lambda s, t, y: output_regression(s, t, "mse"),
    "l1": lambda s, t, y: output_regression(s, t, "l1"),
    "huber": lambda s, t, y: output_regression(s, t, "huber"),
}
"""Never below 0, and 0 for equal logits."""

ALL = DIVERGENCES | {
    "wsld": lambda s, t, y: wsld(s, t, y),
    "tf_kd": lambda s, t, y: tf_kd(s, y),
    "hard_labels": lambda s, t, y: hard_labels(s, y, 0.1),
    "hard_distillation": lambda s, t, y: hard_distillation(s, t),
}

OF_EACH_NUMBER = ("multi_label", "mse", "l1", "huber")
"""Those that compare numbers and not distributions: a shift of a sample is no invariance."""

WITH_TEMPERATURE = {
    "soft_labels": soft_labels,
    "logit_standardization": logit_standardization,
    "jsd": lambda s, t, tau: jsd(s, t, temperature=tau),
    "multi_label": multi_label,
    "dkd": lambda s, t, tau: dkd(s, t, s.argmin(-1), temperature=tau),
    "wsld": lambda s, t, tau: wsld(s, t, s.argmin(-1), temperature=tau),
    "tf_kd": lambda s, t, tau: tf_kd(s, t.argmin(-1), temperature=tau),
    "dist": lambda s, t, tau: dist(s, t, temperature=tau),
    "mlkd": lambda s, t, tau: mlkd(s, t, (tau,)),
}


def parametrize(losses):
    return pytest.mark.parametrize("loss", losses.values(), ids=losses)


@parametrize({name: loss for name, loss in ALL.items() if name not in OF_EACH_NUMBER})
def test_a_shift_of_all_logits_of_a_sample_changes_nothing(loss):
    student, teacher, target = logits_and_classes((5, 7))
    shift = torch.arange(5, dtype=torch.float64)[:, None] * 100
    after = loss(student + shift, teacher - 2 * shift, target)
    # Logits of size 1000 carry a relative rounding of 1e-13; DIST takes small differences of them.
    assert torch.isclose(loss(student, teacher, target), after, rtol=1e-8)


@parametrize(ALL)
def test_the_order_of_the_batch_changes_nothing(loss):
    student, teacher, target = logits_and_classes((6, 5))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.isclose(
        loss(student, teacher, target),
        loss(student[order], teacher[order], target[order]),
        rtol=1e-12,
    )


@parametrize(ALL)
def test_the_order_of_the_classes_changes_nothing(loss):
    student, teacher, target = logits_and_classes((6, 5))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.isclose(
        loss(student, teacher, target),
        loss(student[:, order], teacher[:, order], order.argsort()[target]),
        rtol=1e-12,
    )


@parametrize(ALL)
def test_positions_of_a_sequence_are_samples(loss):
    student, teacher, target = logits_and_classes((3, 4, 5))
    flat = (student.reshape(12, 5), teacher.reshape(12, 5), target.reshape(12))
    assert torch.isclose(loss(student, teacher, target), loss(*flat), rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (4, 2), (3, 1000)])
@parametrize(DIVERGENCES | {"wsld": ALL["wsld"]})
def test_equal_logits_are_where_the_gradient_is_0(loss, shape):
    teacher, _, target = logits_and_classes(shape)
    student = teacher.clone().requires_grad_()
    loss(student, teacher, target).backward()
    # Rounding of float64, times T² and the 8 of DKD.
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6), (4, 2), (3, 1000)])
@parametrize(DIVERGENCES)
def test_equal_logits_give_0(loss, shape):
    teacher, _, target = logits_and_classes(shape)
    assert loss(teacher.clone(), teacher, target).item() == pytest.approx(0, abs=1e-12)


def test_a_student_as_sure_as_the_virtual_teacher_pays_nothing():
    target = torch.tensor([2, 0, 1])
    probabilities = torch.full((3, 3), 0.05, dtype=torch.float64).scatter(1, target[:, None], 0.9)
    student = probabilities.log().requires_grad_()
    loss = tf_kd(student, target, correct=0.9, temperature=4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert student.grad.abs().max() < 1e-14


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(2, 5),
    classes=st.integers(2, 12),
    scale=st.floats(0.1, 20),
)
def test_divergences_are_never_below_0(seed, rows, classes, scale):
    student, teacher, target = logits_and_classes((rows, classes), seed, scale)
    for name, loss in DIVERGENCES.items():
        value = loss(student, teacher, target)
        assert value.isfinite(), name
        # Two equal numbers subtracted: rounding may show below 0.
        assert value >= -1e-12, name


# The weight of WSLD is no path for gradients, so that differences of the loss are not its
# gradient; that is compared with its own formula in test_response_labelled.
@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3), (3, 2)])
@parametrize({name: loss for name, loss in ALL.items() if name != "wsld"})
def test_gradients_are_those_of_the_loss(loss, shape):
    student, teacher, target = logits_and_classes(shape, scale=1.0)
    student.requires_grad_()
    if shape[-1] == 2 and loss is ALL["logit_standardization"]:
        # The z-score of two classes is ±1, a constant.
        loss(student, teacher, target).backward()
        assert student.grad.abs().max() < 1e-12
        return
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, target), student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5, 20.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3, 1000])
@parametrize(WITH_TEMPERATURE)
def test_half_precision_is_finite_for_large_logits(loss, classes, dtype, temperature):
    draw = torch.Generator().manual_seed(0)
    signs = [torch.randint(2, (4, classes), generator=draw) * 2 - 1 for _ in range(2)]
    student, teacher = ((60 * sign).to(dtype) for sign in signs)
    student.requires_grad_()
    value = loss(student, teacher, temperature)
    value.backward()
    assert value.dtype is torch.float32
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@parametrize(WITH_TEMPERATURE)
def test_half_precision_is_near_float64(loss, temperature):
    student, teacher, _ = (z.to(torch.bfloat16) for z in logits_and_classes((8, 10)))
    exact = loss(student.double(), teacher.double(), temperature).item()
    # Float32 inside: 1e-7 of logits of size 10, differences of which T² magnifies.
    assert loss(student, teacher, temperature).item() == pytest.approx(exact, rel=1e-4, abs=1e-4)
