"""Named arrays in splits, and how they become a model's inputs. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.spec import TensorSpec

Array = NDArray[Any]


def is_image(array: Array) -> bool:
    """Whether an input array is a batch of images: (N, C, H, W)."""
    return array.ndim == 4


@dataclass(frozen=True)
class Preprocess:
    """``(x * scale - mean) / std`` in float32.

    ``mean`` and ``std`` hold one value for all, or one per channel or feature. These lie along
    ``axis`` of the batch; without it along axis 1 of images (N, C, H, W) and the last of others.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    axis: int | None = None

    def constants(self, dimensions: int) -> tuple[Array, Array]:
        """``mean`` and ``std`` as float32, shaped to broadcast over an array of this rank."""
        axis = self.axis or (1 if dimensions == 4 else dimensions - 1)
        tail = (1,) * (dimensions - 1 - axis)
        mean = np.asarray(self.mean, np.float32).reshape(-1, *tail)
        std = np.asarray(self.std, np.float32).reshape(-1, *tail)
        return mean, std

    def apply(self, array: Array) -> NDArray[np.float32]:
        """The model's input for a batch of raw samples; the shape stays, the dtype is float32."""
        mean, std = self.constants(array.ndim)
        if array.ndim == 1:
            mean, std = mean.reshape(()), std.reshape(())
        values: NDArray[np.float32] = array.astype(np.float32)
        values *= np.float32(self.scale)
        values -= mean
        values /= std
        return values

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; :meth:`from_json` takes it back."""
        constants = {"scale": self.scale, "mean": list(self.mean), "std": list(self.std)}
        return constants if self.axis is None else {**constants, "axis": self.axis}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_json`."""
        return cls(value["scale"], tuple(value["mean"]), tuple(value["std"]), value.get("axis"))


@dataclass(frozen=True)
class Split:
    """Named arrays (N, …) of the same N; they may be memory-mapped."""

    arrays: Mapping[str, Array]

    def __len__(self) -> int:
        return next((len(array) for array in self.arrays.values()), 0)


@dataclass(frozen=True)
class Dataset:
    """The splits ``train``, ``validation`` and ``test`` with what is needed to feed a model.

    Attributes:
        splits: raw arrays: inputs and targets together, by name.
        inputs: what a model takes *after* preprocessing, batch dimension first.
        targets: what it is taught, e.g. label int64 (batch,).
        labels: class names in the order of the integer labels, where there are any.
        preprocess: per input name; an input without an entry (integers) stays as it is.
        source: where the samples came from, for a person.
        remarks: what was recognized in the samples and is not written in the pipeline.
    """

    splits: Mapping[str, Split]
    inputs: tuple[TensorSpec, ...]
    targets: tuple[TensorSpec, ...]
    labels: tuple[str, ...] | None
    preprocess: Mapping[str, Preprocess]
    source: str
    remarks: tuple[str, ...] = ()

    def model_inputs(self, split: str, start: int, stop: int) -> dict[str, Array]:
        """The preprocessed inputs of samples ``start`` to ``stop`` of a split."""
        arrays = self.splits[split].arrays
        return {
            spec.name: (
                self.preprocess[spec.name].apply(arrays[spec.name][start:stop])
                if spec.name in self.preprocess
                else np.asarray(arrays[spec.name][start:stop])
            )
            for spec in self.inputs
        }
