"""Named tensors: the arrays of a data source, and the inputs and outputs of a model.

A batch is a mapping from name to tensor. Nothing in the project assumes one input, one output
or a class label; an image and its label are the simplest case of this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SAMPLE, VIEW = "@sample", "@view"
"""Keys of a training batch besides inputs and targets: the sample's row in its split, and
the number of its augmentation; both int64 (B,)."""

UNLABELLED = -1
"""The integer target of a sample whose class is not known, as in scikit-learn."""

Dimension = int | str
"""A fixed size, or the name of a symbolic one such as ``"batch"``."""


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor: its shape with the batch dimension first, and its numpy dtype name."""

    name: str
    shape: tuple[Dimension, ...]
    dtype: str = "float32"

    @property
    def sample_shape(self) -> tuple[Dimension, ...]:
        """The shape of one sample: all but the batch dimension."""
        return self.shape[1:]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class ModelSpec:
    """The named inputs and outputs of a model, in their order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; :meth:`from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelSpec:
        """The inverse of :meth:`to_json`."""

        def read(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(r["name"], tuple(r["shape"]), r["dtype"]) for r in rows)

        return cls(read(value["inputs"]), read(value["outputs"]))
