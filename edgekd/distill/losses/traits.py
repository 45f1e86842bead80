"""What the training must know of a loss besides its parameters; it stands above the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

Compares = Literal["classes", "numbers", "anything"]

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_ATTRIBUTE = "loss_traits"


@dataclass(frozen=True)
class LossTraits:
    """The traits of a loss. The defaults are right for every loss, and cost the most.

    Attributes:
        needs_full_logits: whether each of the teacher's logits matters by itself. False where the
            small ones matter by what they add up to only, or hardly: a cache then keeps the
            largest (``distill.cache.top``). Of layers nothing is left out.
        needs_hard_label: whether it needs each sample's own class or identity, which a mixture of
            two samples (mixup, cutmix) does not have.
        compares: what the outputs are to it. ``classes``: the logits of classes that exclude each
            other, so that it is refused for a task without classes, but for layers. ``numbers``:
            it is a distance, taken in the unit of a task with continuous targets. ``anything``:
            it is given what the network gives.
    """

    needs_full_logits: bool = True
    needs_hard_label: bool = False
    compares: Compares = "anything"


def traits(
    *,
    needs_full_logits: bool = True,
    needs_hard_label: bool = False,
    compares: Compares = "anything",
) -> Callable[[Decorated], Decorated]:
    """Give a loss, a function or a module class, its traits; see :class:`LossTraits`."""
    own = LossTraits(needs_full_logits, needs_hard_label, compares)

    def mark(loss: Decorated) -> Decorated:
        setattr(loss, _ATTRIBUTE, own)
        return loss

    return mark


def traits_of(loss: Callable[..., Any]) -> LossTraits:
    """The traits of a loss; the defaults where it has none of its own."""
    while isinstance(loss, partial) and not hasattr(loss, _ATTRIBUTE):
        loss = loss.func
    found = getattr(loss, _ATTRIBUTE, None)
    return found if isinstance(found, LossTraits) else LossTraits()
