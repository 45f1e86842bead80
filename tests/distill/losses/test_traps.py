"""Mistakes that public distillation code makes, and that a response loss here must not."""

import inspect
import math

import pytest
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.response import (
    dist,
    dkd,
    jsd,
    logit_standardization,
    mlkd,
    multi_label,
    soft_labels,
    tf_kd,
    wsld,
)
from edgekd.errors import InputError
from edgekd.extension import check_arguments
from tests.distill.losses.samples import logits_and_classes

SUPPLIED = ("student", "teacher", "target", "mask", "sample")


OVER_CLASSES = {
    "soft_labels": lambda s, t, y: soft_labels(s, t),
    "jsd": lambda s, t, y: jsd(s, t),
    "dkd": lambda s, t, y: dkd(s, t, y),
    "wsld": lambda s, t, y: wsld(s, t, y),
}


@pytest.mark.parametrize("loss", OVER_CLASSES.values(), ids=OVER_CLASSES)
def test_classes_are_summed_over_and_not_averaged(loss):
    """The default of ``nn.KLDivLoss`` divides by C too: four times as many classes, of which
    three quarters are impossible, would then cost a quarter."""
    student, teacher, target = logits_and_classes((5, 4), seed=3, scale=2.0)
    impossible = torch.full((5, 12), -4000.0, dtype=torch.float64)
    more = (torch.cat([z, impossible], dim=1) for z in (student, teacher))
    assert torch.isclose(loss(student, teacher, target), loss(*more, target), rtol=1e-12)


OVER_SAMPLES = OVER_CLASSES | {
    "logit_standardization": lambda s, t, y: logit_standardization(s, t),
    "multi_label": lambda s, t, y: multi_label(s, t),
    "tf_kd": lambda s, t, y: tf_kd(s, y),
    "dist": lambda s, t, y: dist(s, t),
}


@pytest.mark.parametrize("loss", OVER_SAMPLES.values(), ids=OVER_SAMPLES)
def test_samples_are_averaged_over_and_not_summed(loss):
    student, teacher, target = logits_and_classes((5, 4), seed=3, scale=2.0)
    twice = (torch.cat([x, x]) for x in (student, teacher, target))
    assert torch.isclose(loss(student, teacher, target), loss(*twice), rtol=1e-12)


AT_TEMPERATURE = {
    "soft_labels": soft_labels,
    "logit_standardization": logit_standardization,
    "jsd": lambda s, t, tau: jsd(s, t, temperature=tau),
    "jsd forward": lambda s, t, tau: jsd(s, t, 0.0, tau),
    "multi_label": multi_label,
    "dkd": lambda s, t, tau: dkd(s, t, t.argmax(-1), temperature=tau),
    "dkd, target alone": lambda s, t, tau: dkd(s, t, t.argmax(-1), 1.0, 0.0, tau),
    "dkd, others alone": lambda s, t, tau: dkd(s, t, t.argmax(-1), 0.0, 1.0, tau),
    "wsld": lambda s, t, tau: wsld(s, t, t.argmax(-1), tau),
    "tf_kd": lambda s, t, tau: tf_kd(s, t.argmax(-1), temperature=tau),
}


@pytest.mark.parametrize("loss", AT_TEMPERATURE.values(), ids=AT_TEMPERATURE)
def test_no_loss_drops_the_squared_temperature(loss):
    """Without T² the gradient falls with T², here to a quarter."""
    student, teacher, _ = logits_and_classes((5, 6), seed=3, scale=2.0)
    sizes = []
    for temperature in (200.0, 400.0):
        leaf = student.clone().requires_grad_()
        loss(leaf, teacher, temperature).backward()
        sizes.append(leaf.grad.norm().item())
    # First order in z/T, which is some 1/100.
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_soft_labels_are_a_divergence_and_no_distance_of_probabilities():
    """A squared error of probabilities is below 2 and flat where a student is surely wrong."""
    teacher = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, 40.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = soft_labels(student, teacher, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(40, rel=1e-6)
    assert student.grad[0].tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


@pytest.mark.parametrize("size", [1.0, 60.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dkd_of_two_classes_is_soft_labels(size, dtype):
    """One other class: nothing to distinguish among the others, and no inf from masking them."""
    student = torch.tensor([[size, -size], [0.3, 0.1], [-size, size]], dtype=dtype)
    teacher = torch.tensor([[-size, size], [0.2, 0.7], [-size, size]], dtype=dtype)
    target = torch.tensor([0, 1, 0])
    student.requires_grad_()
    whole = dkd(student, teacher, target)
    assert torch.isclose(whole, soft_labels(student, teacher))
    of_others = dkd(student, teacher, target, alpha=0.0)
    assert of_others.item() == 0.0
    for loss in (whole, of_others):
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert gradient.isfinite().all()


def test_dkd_leaves_the_target_out_whatever_the_others_are():
    """A mask of −1000 would be the largest logit among others of −3000."""
    student = torch.tensor([[0.0, -3000.0, -3001.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, -3001.0, -3000.0]], dtype=torch.float64)
    p = 1 / (1 + math.e)
    expected = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    value = dkd(student, teacher, torch.tensor([0]), alpha=0.0, beta=1.0, temperature=1.0)
    assert value.item() == pytest.approx(expected, rel=1e-9)


SOFTENED = [
    name
    for name, loss in LOSSES.items()
    if loss.__module__.startswith("edgekd.distill.losses.response")
    and "temperature" in inspect.signature(loss).parameters
]


@pytest.mark.parametrize("name", SOFTENED)
@pytest.mark.parametrize("temperature", [0.5, 0, -4, "4", True, float("nan")])
def test_a_temperature_that_sharpens_is_refused(name, temperature):
    with pytest.raises(InputError, match="temperature"):
        check_arguments(
            LOSSES[name], {"temperature": temperature}, supplied=SUPPLIED, name=f"loss {name!r}"
        )


def test_every_loss_with_a_softmax_has_a_temperature():
    names = {"soft_labels", "logit_standardization", "jsd", "multi_label", "dkd", "wsld", "dist"}
    assert set(SOFTENED) == names | {"tf_kd"}
    assert "temperatures" in inspect.signature(mlkd).parameters


@pytest.mark.parametrize("name", SOFTENED)
def test_the_defaults_satisfy_their_own_limits(name):
    parameters = inspect.signature(LOSSES[name]).parameters
    defaults = {key: p.default for key, p in parameters.items() if key not in SUPPLIED}
    assert check_arguments(LOSSES[name], defaults, supplied=SUPPLIED, name=name) == defaults
