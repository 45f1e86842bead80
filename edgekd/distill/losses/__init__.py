"""The losses a pipeline can name.

Every public function of this package's modules whose first parameter is ``student`` is one, under
its own name. Adding a loss is adding one such function; there is nothing to register.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from torch import Tensor

Loss = Callable[..., Tensor]


def _losses() -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            if next(iter(inspect.signature(function).parameters), None) != "student":
                continue
            if name in found:
                raise RuntimeError(f"two losses are named {name!r}")
            found[name] = function
    return found


LOSSES: dict[str, Loss] = _losses()
"""The built-in losses by the names they have in a pipeline."""
