"""The losses a pipeline can name.

Every public function of this package's modules whose first parameter is ``student`` is one, under
its own name. A loss with trained parts (an adapter, a memory bank) is a module class: its name in
a pipeline is the class's in lower case with underscores, its ``__init__`` takes the captured shapes
``student`` and ``teacher`` first and hyper-parameters after them, its ``forward`` takes the
tensors. It takes precedence over the pure function of the same name, which it calls.

Adding a loss is adding one such function or class, with its :func:`traits` above it; there is
nothing to register.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

Loss = Callable[..., Tensor] | type[nn.Module]

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_TRAITS = "loss_traits"


@dataclass(frozen=True)
class LossTraits:
    """What the training must know of a loss besides its parameters.

    The defaults are right for every loss, and cost the most.

    Attributes:
        needs_full_logits: whether each of the teacher's logits matters by itself. False where the
            small ones matter only by their sum, or hardly: a cache then stores the largest
            (``distill.cache.top``). Layers are never shortened.
        needs_hard_label: whether it needs each sample's own class or identity, which a mixture of
            two samples (mixup, cutmix) does not have.
        compares: what the outputs are to it. ``classes``: the logits of classes that exclude each
            other; refused for a task without classes, except for layers. ``numbers``: a distance,
            computed in the unit of a task with continuous targets. ``anything``: the network's
            outputs as they are.
    """

    needs_full_logits: bool = True
    needs_hard_label: bool = False
    compares: Literal["classes", "numbers", "anything"] = "anything"


def traits(
    *,
    needs_full_logits: bool = True,
    needs_hard_label: bool = False,
    compares: Literal["classes", "numbers", "anything"] = "anything",
) -> Callable[[Decorated], Decorated]:
    """Give a loss, a function or a module class, its :class:`LossTraits`."""

    def mark(loss: Decorated) -> Decorated:
        setattr(loss, _TRAITS, LossTraits(needs_full_logits, needs_hard_label, compares))
        return loss

    return mark


def traits_of(loss: Callable[..., Any]) -> LossTraits:
    """The traits of a loss; the defaults where it has none of its own."""
    while isinstance(loss, partial) and not hasattr(loss, _TRAITS):
        loss = loss.func
    found = getattr(loss, _TRAITS, None)
    return found if isinstance(found, LossTraits) else LossTraits()


def takes_sequence(parameter: inspect.Parameter) -> bool:
    """Whether a loss takes all of its layers at once: its parameter is a sequence of tensors."""
    return str(parameter.annotation).startswith(("Sequence[", "list[", "tuple[", "collections."))


def _in_module(module: ModuleType) -> Iterator[tuple[str, Loss]]:
    """The losses of one module: functions first, so that a class of the same name replaces one."""
    own = [
        (name, value)
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    for name, value in own:
        if inspect.isfunction(value) and _first_parameter(value, 0) == "student":
            yield name, value
    for name, value in own:
        is_module = inspect.isclass(value) and issubclass(value, nn.Module)
        if is_module and _first_parameter(value.forward, 1) == "student":
            yield re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), value


def _first_parameter(function: Callable[..., object], skip: int) -> str | None:
    return next(iter(list(inspect.signature(function).parameters)[skip:]), None)


def _losses() -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for entry in pkgutil.iter_modules(__path__):
        losses = dict(_in_module(importlib.import_module(f"{__name__}.{entry.name}")))
        for name in losses.keys() & found.keys():
            raise RuntimeError(f"two losses are named {name!r}")
        found |= losses
    return found


LOSSES: dict[str, Loss] = _losses()
"""The built-in losses by the names they have in a pipeline; the last statement of this module,
because the modules that it imports take :func:`traits` from here."""
