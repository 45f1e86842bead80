"""Training schemes: which network teaches which, and when.

Every public function of this package's modules whose first parameter is ``context`` is a scheme,
under its own name (without an underscore at its end); there is nothing to register.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BeforeValidator
from torch import nn

from edgekd.config.networks import ModelConfig, TeacherConfig
from edgekd.config.training import SchemeConfig
from edgekd.distill.checkpoint import History
from edgekd.distill.objective import Objective
from edgekd.distill.teacher import Teacher
from edgekd.errors import InputError
from edgekd.extension import check_arguments, parameters_of, resolve
from edgekd.models.build import find_model
from edgekd.models.dict_model import DictModel
from edgekd.tasks import Task


class Fit(Protocol):
    """The one training loop with the pipeline's data and settings."""

    def __call__(
        self, model: nn.Module, objective: Objective, label: str, teacher: Teacher | None = None
    ) -> History:
        """Train ``model`` in place; afterwards it has the weights of its best epoch on validation.

        Args:
            model: takes a batch, returns outputs by name.
            objective: a fresh one: its adapters are trained with this model.
            label: the name of the training; different for each training of a scheme.
            teacher: the teacher, when the objective needs one; through the cache if there is one.
        """
        ...


@dataclass(frozen=True)
class SchemeContext:
    """The context of a scheme: networks, data and training loop.

    Attributes:
        student: the network that is shipped, with its initial weights; trained in place.
        teacher: the pipeline's teacher.
        task: defines the meaning of the outputs.
        label_smoothing: the pipeline's, for terms that a scheme makes itself.
        fit: the training loop.
        new_objective: a fresh objective of the pipeline's loss terms.
        new_student: another student; the same index gives the same initial weights, 0 those of
            ``student``.
        build: a network for the same data by its section of the pipeline, with initial weights
            drawn from the pipeline's seed and the index.
        open_teacher: another teacher by its section: loaded, or trained with ``fit``'s loop on
            the data's own labels. The text is its YAML position and label.
        say: prints a progress message.
    """

    student: DictModel
    teacher: Teacher
    task: Task
    label_smoothing: float
    fit: Fit
    new_objective: Callable[[], Objective]
    new_student: Callable[[int], DictModel]
    build: Callable[[ModelConfig, int], DictModel]
    open_teacher: Callable[[TeacherConfig, str], Teacher]
    say: Callable[[str], None]


Scheme = Callable[..., Mapping[str, History]]
"""A function ``(context, **arguments)`` that trains ``context.student`` and returns the history of
each training by its label; the student's own has the label ``student``."""


def _section(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _known(config: ModelConfig) -> ModelConfig:
    find_model(config.model or "", "distill.scheme")
    return config


Network = Annotated[ModelConfig, BeforeValidator(_section), AfterValidator(_known)]
"""A scheme's argument that is a network: a name, or ``{model: name, args: {…}}``. The name
is checked before the first stage runs."""


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
"""The built-in schemes by the names they have in a pipeline; assigned after the classes above,
which the modules that are imported here take from this one."""


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
