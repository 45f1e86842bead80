"""One term of an objective: the interface, and the base class of built-in terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor, nn

Named = Mapping[str, Tensor]
"""Tensors by name: outputs and features, or a batch."""


class Term(Protocol):
    """The interface of a loss term: one weighted summand of the objective."""

    @property
    def label(self) -> str:
        """Its name in the history."""
        ...

    @property
    def identity(self) -> str:
        """Everything that decides its value, as text."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with the teacher."""
        ...

    @property
    def needs_full_logits(self) -> bool:
        """Whether it needs each of the teacher's logits, not only the largest ones."""
        ...

    @property
    def needs_hard_label(self) -> bool:
        """Whether it needs one class per sample, not a mixture of two."""
        ...

    @property
    def needs_shapes(self) -> bool:
        """Whether it has trained parts, made from shapes by :meth:`prepare`."""
        ...

    @property
    def student_layers(self) -> tuple[str, ...]:
        """The student's layers it compares; none: the primary output."""
        ...

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """The teacher's layers it compares; none: the primary output."""
        ...

    def place(self, role: Literal["student", "teacher"]) -> str:
        """Where its layers of the student or of the teacher are named, for errors."""
        ...

    def weight(self, part: float) -> float:
        """Its factor in the sum when ``part`` (0 to 1) of the training is done."""
        ...

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make its trained parts from the shapes of a first batch."""
        ...

    def __call__(self, student: Named, teacher: Named | None, batch: Named, part: float) -> Tensor:
        """Its value, a scalar."""
        ...


class BuiltinTerm(nn.Module):
    """Base class of terms that a pipeline does not name: a scheme's, and the hard loss.

    Args:
        label: its name in the history.
        weight: its factor in the sum.
        layers: the layers of the trained network that it reads.
    """

    needs_teacher = False
    needs_full_logits = False
    needs_hard_label = False
    needs_shapes = False
    teacher_layers: tuple[str, ...] = ()

    def __init__(self, label: str, weight: float = 1.0, layers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.label = label
        self.student_layers = layers
        self._weight = weight

    @property
    def identity(self) -> str:
        """Everything that decides the term's value, as text."""
        return f"{self.label} {self._weight} {self.student_layers}"

    def place(self, role: Literal["student", "teacher"]) -> str:
        """The config path that names a layer; the term itself here."""
        return f"distill.scheme, {self.label}"

    def weight(self, part: float) -> float:
        """Its constant factor in the sum."""
        return self._weight

    def prepare(self, student: Named, teacher: Named | None, samples: int) -> None:
        """Make its trained parts; by default there are none."""
