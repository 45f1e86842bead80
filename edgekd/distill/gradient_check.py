"""Check before a training that each loss term has a gradient to the student."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from edgekd.distill.loss_term import ConfiguredLoss
from edgekd.distill.objective import Objective, has_classes
from edgekd.distill.term import Named
from edgekd.errors import InputError

BATCHES = 4
"""Number of batches that must all show no gradient before a term is refused."""

_BINARY = 2
_TWO_CLASSES = (
    "use soft_labels or wsld: of two classes the standardized logits are always (1, -1) or "
    "(-1, 1), dkd without alpha is constant, and dist without gamma correlates fully"
)

_NOTHING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""‖gradient‖ · ‖outputs‖ as a share of the loss, below which a gradient is rounding."""


def check_gradients(
    objective: Objective, batches: Iterable[tuple[Named, Named | None, Named]]
) -> list[str]:
    """Refuse a term whose gradient to the student is zero on every batch that could have one.

    The gradient is taken at the student's outputs and at perturbed ones, because a student
    that starts with its teacher's outputs has none at first. Terms that a scheme makes are not
    checked. The objective and the random state are left unchanged.

    Args:
        objective: prepared.
        batches: the student's outputs and features, the teacher's, and the batch; as many are
            taken as needed, most often one.

    Returns:
        A remark on each loss of the user's own that was 0 on all of these batches: one that counts
        some samples only, such as those that the teacher is sure of, may find them later.

    Raises:
        InputError: a term has no gradient.
    """
    remarks = []
    silent = [t for t in objective.terms if isinstance(t, ConfiguredLoss) and t.ever_weighs]
    tried = dict.fromkeys((term.label for term in silent), 0)
    largest = dict.fromkeys(tried, 0.0)
    student: Named = {}
    for number, (student, teacher, batch) in enumerate(batches, start=1):
        for term in list(silent):
            if not term.can_teach(batch):
                continue
            tried[term.label] += 1
            found, value = _has_gradient(term, student, teacher, batch)
            largest[term.label] = max(largest[term.label], abs(value))
            if found:
                silent.remove(term)
        if not silent or number == BATCHES:
            break
    for term in silent:
        if tried[term.label] and largest[term.label] == 0 and not term.is_built_in:
            remarks.append(
                f"the loss {term.label!r} is 0 on the first {tried[term.label]} batches, and "
                "teaches nothing until it is not"
            )
        elif tried[term.label]:
            size = student[term.task.output].shape[-1]
            raise InputError(
                f"the loss {term.label!r} has no gradient to the student: whatever the student "
                f"predicts, it is the same (on {tried[term.label]} of the first batches)",
                where=term.where,
                remedy=_TWO_CLASSES
                if size == _BINARY and has_classes(term.task)
                else "remove it, or change what makes it constant: a batch of one sample, a "
                "factor of 0, a .detach() or a decision such as argmax",
            )
    return remarks


def _has_gradient(
    term: ConfiguredLoss, student: Named, teacher: Named | None, batch: Named
) -> tuple[bool, float]:
    """Whether there is a gradient, and the loss; 1 for one that is not connected to the student."""
    # Modules have weights in float32, and may update buffers when called.
    own = copy.deepcopy(term) if term.needs_shapes else term
    dtype = torch.float32 if term.needs_shapes else torch.float64
    largest = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for share in (0.0, 0.1):
            leaves = {k: _leaf(t, dtype, share) for k, t in student.items()}
            taught = None if teacher is None else {k: _wide(t, dtype) for k, t in teacher.items()}
            floats = [t for t in leaves.values() if t.requires_grad]
            with torch.enable_grad():
                value = own(leaves, taught, batch, 0.5)
            if not value.requires_grad:
                largest = 1.0
                continue
            largest = max(largest, abs(float(value.detach())))
            found = torch.autograd.grad(value, floats, allow_unused=True)
            size = sum(
                float(g.double().norm() * t.detach().double().norm())
                for g, t in zip(found, floats, strict=True)
                if g is not None
            )
            # NaN is a gradient too: the training itself reports it.
            if not size <= _NOTHING[dtype] * abs(float(value.detach())):
                return True, largest
    return False, largest


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _leaf(tensor: Tensor, dtype: torch.dtype, share: float) -> Tensor:
    """The tensor as a leaf that requires a gradient, with noise proportional to its spread."""
    if not tensor.is_floating_point():
        return tensor
    wide = tensor.detach().to(dtype)
    if share:
        spread = wide.std() if wide.numel() > 1 else wide.abs().mean()
        wide = wide + share * (spread + 1e-3) * torch.randn_like(wide)
    else:
        wide = wide.clone()
    return wide.requires_grad_()
