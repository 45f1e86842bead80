"""Real inputs of a model, read in batches: calibration never holds all of them in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Samples(Protocol):
    """The inputs of a model by name, preprocessed as the model takes them."""

    @property
    def count(self) -> int:
        """The number of samples."""
        ...

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """All samples in their order, ``size`` at a time (the last batch may be smaller).

        Each call starts from the first sample. Arrays are (size, …), inputs by name.
        """
        ...


class ArraySamples:
    """Samples that are in memory already: arrays (N, …) by input name."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}

    @property
    def count(self) -> int:
        """The number of samples."""
        return min((len(array) for array in self._arrays.values()), default=0)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`Samples`."""
        for start in range(0, self.count, size):
            yield {
                name: array[start : min(start + size, self.count)]
                for name, array in self._arrays.items()
            }


def is_mask(values: Array) -> bool:
    """Whether floats are 0 or below, -inf among them: what is added before a softmax to leave
    places out. Other infinities, and NaN, are broken data."""
    return values.dtype.kind == "f" and bool((values <= 0).all())
