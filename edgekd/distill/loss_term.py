"""The terms of an objective, and the one that a pipeline names: a loss with its layers, arguments
and schedules bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from edgekd.config.training import LossTerm, Schedule
from edgekd.distill.features import layer_key
from edgekd.distill.losses import LOSSES, Loss, takes_sequence, traits_of
from edgekd.errors import EdgekdError, InputError
from edgekd.extension import check_arguments, parameters_of, resolve
from edgekd.spec import SAMPLE
from edgekd.tasks import Task
from edgekd.tasks.continuous import ContinuousTask

TENSORS = ("student", "teacher", "target", "mask", "sample")
"""The parameters of a loss that the objective fills in; all others come from YAML."""

_SUPPLIED = (*TENSORS, "samples")


Named = Mapping[str, Tensor]
"""Tensors by name: outputs and features, or a batch."""


class Term(nn.Module):
    """One weighted summand of an objective: the base class of all loss terms.

    Its ``forward(student, teacher, batch, progress)`` gives its value, a scalar; ``progress`` is
    the share of the training that is done, 0 to 1.

    Args:
        label: its name in the history.
        weight: its constant factor in the sum.
        layers: the layers of the trained network that it reads; none: the primary output.
        settings: everything else that decides its value.

    Attributes:
        needs_teacher: whether it compares with the teacher.
        needs_full_logits: whether it needs each of the teacher's logits, not only the largest.
        needs_hard_label: whether it needs one class per sample, not a mixture of two.
        needs_shapes: whether it has trained parts, made from shapes by :meth:`prepare`.
        teacher_layers: the teacher's layers it compares; none: the primary output.
    """

    needs_teacher: bool = False
    needs_full_logits: bool = False
    needs_hard_label: bool = False
    needs_shapes: bool = False
    teacher_layers: tuple[str, ...] = ()

    def __init__(
        self,
        label: str,
        weight: float | Schedule = 1.0,
        layers: tuple[str, ...] = (),
        settings: tuple[object, ...] = (),
    ) -> None:
        super().__init__()
        self.label = label
        self.student_layers = layers
        self._weight, self._settings = weight, settings

    @property
    def fingerprint(self) -> str:
        """Everything that decides its value, as text."""
        return f"{self.label} {self._weight} {self.student_layers} {self._settings}"

    def config_path(self, role: Literal["student", "teacher"]) -> str:
        """Where the pipeline file names its layers of the student or the teacher, for errors."""
        return f"distill.scheme, {self.label}"

    def weight(self, progress: float) -> float:
        """Its factor in the sum."""
        return self._weight.at(progress) if isinstance(self._weight, Schedule) else self._weight

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make its trained parts from the shapes of a first batch; by default there are none."""


class ConfiguredLoss(Term):
    """A loss of the pipeline, a pure function or a module with trained parts.

    Raises:
        InputError: no such loss, a wrong argument, or a loss for classes in a task without them.
    """

    def __init__(
        self, term: LossTerm, label: str, task: Task, label_smoothing: float, where: str
    ) -> None:
        super().__init__(label, term.weight)
        self.task, self.where = task, where
        self.loss: Loss = resolve(term.name, LOSSES, "loss", where, group="edgekd.losses")
        self.traits = traits_of(self.loss)
        self.needs_shapes = inspect.isclass(self.loss)
        made_with = parameters_of(self.loss, where)
        called_with = _called_with(self.loss, where)
        if "student" not in called_with:
            raise InputError(
                f"{term.name!r} is no loss: it has no parameter 'student'",
                where=where,
                remedy="write it as def name(student, teacher, …) or def name(student, target, …)",
            )
        self.tensors = tuple(name for name in TENSORS if name in called_with)
        self.needs_teacher = "teacher" in self.tensors
        self._takes_lists = takes_sequence(called_with["student"])
        args = dict(term.args)
        self.student_layers = _layers(args.pop("student", None), "student", where)
        self.teacher_layers = _layers(args.pop("teacher", None), "teacher", where)
        self.needs_full_logits = (
            self.needs_teacher and not self.teacher_layers and self.traits.needs_full_logits
        )
        self.needs_hard_label = self.traits.needs_hard_label
        self._check_layers()
        self._check_task(term.name)
        self._schedules = _schedules(args, self.needs_shapes, where)
        first = {key: schedule.start for key, schedule in self._schedules.items()}
        last = {key: schedule.end for key, schedule in self._schedules.items()}
        for ends in (last, first):
            self.args = check_arguments(
                self.loss,
                {**args, **ends},
                supplied=_SUPPLIED,
                name=f"loss {term.name!r}",
                where=where,
            )
        if label_smoothing and "label_smoothing" in made_with:
            self.args.setdefault("label_smoothing", label_smoothing)
        self._takes_samples = self.needs_shapes and "samples" in made_with
        self._calls: list[Callable[..., Tensor]] = []
        self.pairs = nn.ModuleList()
        if not self.needs_shapes:
            self._calls = [self.loss] * self._pair_count

    @property
    def fingerprint(self) -> str:
        """Everything that decides the term's value, as text."""
        layers = f"{self.student_layers} {self.teacher_layers}"
        unit = unit_fingerprint(self._unit)
        return f"{self.label} {self._weight} {self.args} {self._schedules} {layers}{unit}"

    @property
    def is_built_in(self) -> bool:
        """Whether the loss is the project's own, and not the user's."""
        return self.loss in LOSSES.values()

    @property
    def ever_weighs(self) -> bool:
        """Whether its weight is ever above zero."""
        return any(_numbers(self._weight))

    def can_teach(self, batch: Named) -> bool:
        """Whether a batch has what the loss reads: a label, an unmasked element."""
        if "target" in self.tensors:
            target = batch[self.task.target]
            known = target.isfinite() if target.is_floating_point() else target >= 0
            if target.is_floating_point() and target.ndim > 1 and not self._continuous:
                known = target.sum(dim=-1) > 0  # Mixed classes; a row of zeros is unlabelled.
            if not bool(known.any()):
                return False
        mask = batch.get(f"{self.task.target}_mask") if "mask" in self.tensors else None
        return mask is None or bool((mask != 0).any())

    @property
    def _continuous(self) -> bool:
        return isinstance(self.task, ContinuousTask)

    def config_path(self, role: Literal["student", "teacher"]) -> str:
        """The config path of its layers of the student or the teacher."""
        return f"{self.where}.{role}"

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make the trained parts from the shapes of a first batch."""
        if not self.needs_shapes or len(self.pairs):
            return
        extra = {"samples": samples} if self._takes_samples else {}
        for of_student, of_teacher in self._pairs(student, teacher):
            shapes = {"student": _shapes(of_student)}
            if of_teacher is not None:
                shapes["teacher"] = _shapes(of_teacher)
            try:
                made = self.loss(**shapes, **self.args, **extra)
            except EdgekdError as error:
                raise self._located(error, of_student, of_teacher) from error
            assert isinstance(made, nn.Module)
            first = of_student if isinstance(of_student, Tensor) else of_student[0]
            self.pairs.append(made.to(first.device))
        self._calls = list(self.pairs)

    def forward(
        self, student: Named, teacher: Named | None, batch: Named, progress: float = 0.0
    ) -> Tensor:
        """The loss, a scalar; over several pairs of layers the sum of theirs.

        Raises:
            InputError: shapes that do not fit, or a loss that does not return a scalar.
        """
        supplied: dict[str, Tensor | None] = {}
        if "target" in self.tensors:
            supplied["target"] = self._in_unit(batch[self.task.target], ())
        if "sample" in self.tensors:
            supplied["sample"] = batch[SAMPLE]
        args = self.args
        if self._schedules:
            args = args | {key: schedule.at(progress) for key, schedule in self._schedules.items()}
        hyper = {} if self.needs_shapes else args
        values = []
        for call, (of_student, of_teacher) in zip(
            self._calls, self._pairs(student, teacher), strict=True
        ):
            own = self._in_unit(of_student, self.student_layers)
            given: dict[str, Any] = {"student": own, **supplied, **hyper}
            if "mask" in self.tensors:
                given["mask"] = self._mask(batch, of_student)
            if of_teacher is not None:
                given["teacher"] = self._in_unit(of_teacher, self.teacher_layers)
            try:
                values.append(call(**given))
            except EdgekdError as error:
                raise self._located(error, of_student, of_teacher) from error
        value = values[0] if len(values) == 1 else sum(values)
        if not isinstance(value, Tensor) or value.ndim:
            given_back = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"a loss must return one number (a tensor without dimensions), not {given_back}",
                where=self.where,
                remedy="end it with .mean()",
            )
        return value

    @property
    def _unit(self) -> float:
        """The task's unit, if the loss is a distance of numbers; else 1."""
        return getattr(self.task, "unit", 1.0) if self.traits.compares == "numbers" else 1.0

    def _in_unit(self, value: Any, layers: Sequence[str]) -> Any:
        """An output or a target as the loss compares it; layers, and outputs of other losses,
        unchanged.
        """
        if layers or self._unit == 1.0 or not isinstance(value, Tensor):
            return value
        return value.float() / self._unit

    def _mask(self, batch: Named, of_student: Any) -> Tensor | None:
        """The mask: the target's for the output, the tokens' for a layer of a sequence."""
        if not self.student_layers:
            return batch.get(f"{self.task.target}_mask")
        mask = batch.get("attention_mask")
        if mask is None or not isinstance(of_student, Tensor):
            return None
        # Attention maps are (B, heads, T, T), hidden states (B, T, F).
        length = of_student.shape[-1] if of_student.ndim == 4 else of_student.shape[1]
        return mask if mask.shape == (len(of_student), length) else None

    @property
    def _pair_count(self) -> int:
        if self._takes_lists:
            return 1
        return max(1, len(self.student_layers), len(self.teacher_layers))

    def _pairs(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor] | None
    ) -> list[tuple[Any, Any]]:
        """The arguments of each call: one per pair, or lists when the loss takes all layers at
        once.
        """
        of_student = _chosen(student, self.student_layers, self.task.output)
        of_teacher: Sequence[Tensor | None] = [None] * len(of_student)
        if self.needs_teacher:
            outputs = _present(teacher, self.teacher_layers, self.task.output, self.where)
            of_teacher = _chosen(outputs, self.teacher_layers, self.task.output)
        if self._takes_lists:
            return [(of_student, of_teacher if self.needs_teacher else None)]
        count = self._pair_count
        # One output against several layers: it is compared with each of them.
        return list(zip(_repeated(of_student, count), _repeated(of_teacher, count), strict=True))

    def _located(self, error: EdgekdError, of_student: Any, of_teacher: Any) -> InputError:
        """A loss's error, extended by the term, its layers and their shapes."""
        named = []
        for role, layers, value in (
            ("student", self.student_layers, of_student),
            ("teacher", self.teacher_layers, of_teacher),
        ):
            if value is not None:
                shapes = [list(t.shape) for t in ([value] if isinstance(value, Tensor) else value)]
                named.append(f"{role} {', '.join(layers) or 'output'} {str(shapes)[1:-1]}")
        where = error.where or f"{self.where} ({'; '.join(named)})"
        return InputError(error.what, where=where, remedy=error.remedy)

    def _check_layers(self) -> None:
        student, teacher = len(self.student_layers), len(self.teacher_layers)
        if teacher and not self.needs_teacher:
            raise InputError(
                "this loss has no parameter 'teacher'", where=self.where, remedy="remove 'teacher'"
            )
        if student > 1 and teacher > 1 and student != teacher and not self._takes_lists:
            raise InputError(
                f"{student} layers of the student cannot be paired with {teacher} of the teacher",
                where=self.where,
                remedy="name as many of each, in the order in which they are compared",
            )

    def _check_task(self, name: str) -> None:
        if self.traits.compares != "classes" or self.student_layers:
            return
        if self._continuous:
            other = "output_regression" if self.needs_teacher else "target_regression"
            raise InputError(
                f"{name} compares classes of the task classification, and the task "
                f"{self.task.name} has none",
                where=self.where,
                remedy=f"use {other}; or multi_label where each output is the logit of a "
                "yes-or-no question",
            )


def unit_fingerprint(unit: float) -> str:
    """The unit in which a loss compares, as text; empty where it is 1."""
    return "" if unit == 1.0 else f" in units of {unit!r}"


def _called_with(loss: Loss, where: str) -> dict[str, inspect.Parameter]:
    if inspect.isclass(loss):
        forward = getattr(loss, "forward", None)
        if not issubclass(loss, nn.Module) or forward is None:
            raise InputError(
                f"{loss.__name__!r} is a class, but no torch module",
                where=where,
                remedy="name a function of tensors, or a subclass of torch.nn.Module",
            )
        parameters = parameters_of(forward, where)
        parameters.pop("self", None)
        return parameters
    return parameters_of(loss, where)


def _numbers(weight: float | Schedule) -> tuple[float, ...]:
    return (weight.start, weight.end) if isinstance(weight, Schedule) else (weight,)


def _layers(value: object, role: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    layers = (value,) if isinstance(value, str) else value
    if not isinstance(layers, list | tuple) or not all(isinstance(v, str) for v in layers):
        raise InputError(
            f"{role!r} is {value!r}, and not a layer or a list of layers",
            where=where,
            remedy="name module paths; 'edgekd layers' lists them",
        )
    return tuple(layers)


def _schedules(args: Mapping[str, Any], trained: bool, where: str) -> dict[str, Schedule]:
    schedules = {}
    for key, value in args.items():
        if not isinstance(value, Mapping) or "start" not in value:
            continue
        if trained:
            raise InputError(
                f"{key!r} of a loss with trained parts cannot change over the training",
                where=where,
                remedy="give one number; the weight may have a schedule",
            )
        try:
            schedules[key] = Schedule.model_validate(value)
        except ValueError as error:
            raise InputError(
                f"the schedule of {key!r} is wrong: {str(error).splitlines()[-2].strip()}",
                where=where,
                remedy="write {start: 8, end: 2, over: 0.5, shape: cosine}",
            ) from error
    return schedules


def _chosen(outputs: Mapping[str, Tensor], layers: Sequence[str], output: str) -> list[Tensor]:
    return [outputs[layer_key(layer)] for layer in layers] if layers else [outputs[output]]


def _repeated(values: Sequence[Any], count: int) -> Sequence[Any]:
    return list(values) * count if len(values) == 1 else values


def _present(
    teacher: Mapping[str, Tensor] | None, layers: Sequence[str], output: str, where: str
) -> Mapping[str, Tensor]:
    if teacher is None:
        raise InputError(
            "this loss compares with a teacher, and there is none",
            where=where,
            remedy="give a teacher, or use hard_labels or target_regression alone",
        )
    if not layers and output not in teacher:
        raise InputError(
            f"the teacher outputs {', '.join(teacher)}, and not {output!r}",
            where=where,
            remedy=f"name its output {output!r}",
        )
    return teacher


def _shapes(value: Tensor | Sequence[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [tuple(tensor.shape) for tensor in value]
