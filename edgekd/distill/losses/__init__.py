"""The losses a pipeline can name.

Every public function of this package's modules whose first parameter is ``student`` is one, under
its own name. A loss with trained parts (an adapter, a memory bank) is a module class: its name in
a pipeline is the class's in lower case with underscores, its ``__init__`` takes the captured shapes
``student`` and ``teacher`` first and hyper-parameters after them, its ``forward`` takes the
tensors. It takes precedence over the pure function of the same name, which it calls.

Adding a loss is adding one such function or class; there is nothing to register.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor, nn

Loss = Callable[..., Tensor] | type[nn.Module]


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
            yield _snake_case(name), value


def _first_parameter(function: Callable[..., object], skip: int) -> str | None:
    return next(iter(list(inspect.signature(function).parameters)[skip:]), None)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _losses() -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for entry in pkgutil.iter_modules(__path__):
        losses = dict(_in_module(importlib.import_module(f"{__name__}.{entry.name}")))
        for name in losses.keys() & found.keys():
            raise RuntimeError(f"two losses are named {name!r}")
        found |= losses
    return found


LOSSES: dict[str, Loss] = _losses()
"""The built-in losses by the names they have in a pipeline."""
