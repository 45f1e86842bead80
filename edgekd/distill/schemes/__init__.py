"""Training schemes: which network teaches which, and when.

Every public function of this package's modules whose first parameter is ``context`` is a scheme,
under its own name (without an underscore at its end); there is nothing to register.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from edgekd.config.training import SchemeConfig
from edgekd.distill.schemes.scheme import Scheme, SchemeContext
from edgekd.errors import InputError
from edgekd.extension import check_arguments, parameters_of, resolve

__all__ = ["SCHEMES", "Scheme", "SchemeContext", "find_scheme"]


def _schemes() -> dict[str, Scheme]:
    found: dict[str, Scheme] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue
            if next(iter(inspect.signature(function).parameters), None) == "context":
                found[name.rstrip("_")] = function
    return found


SCHEMES: Mapping[str, Scheme] = _schemes()
"""The built-in schemes by the names they have in a pipeline."""


def find_scheme(config: SchemeConfig, where: str = "distill.scheme") -> Scheme:
    """The scheme that a pipeline names, with its arguments bound and checked.

    Raises:
        InputError: there is no such scheme, it takes no context, or an argument is wrong.
    """
    scheme: Any = resolve(config.name, SCHEMES, "scheme", where, group="edgekd.schemes")
    if "context" not in parameters_of(scheme, where):
        raise InputError(
            f"{config.name!r} is no scheme: it has no parameter 'context'",
            where=where,
            remedy="write it as def name(context, …), which trains context.student",
        )
    position = f"{where}.{config.name}"
    name = f"scheme {config.name!r}"
    args = check_arguments(scheme, config.args, supplied=("context",), name=name, where=position)
    bound: Scheme = partial(scheme, **args)
    return bound
