"""Samples of a model that record or generate what is requested."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edgekd.onnx.samples import ArraySamples


class CountedSamples(ArraySamples):
    """Records the requested batch sizes."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.sizes: list[int] = []

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        self.sizes.append(size)
        return super().batches(size)


class GeneratedSamples:
    """``count`` samples of the input ``name``, each made on request from its index."""

    def __init__(self, name: str, count: int, make: Callable[[int], np.ndarray]) -> None:
        self.name, self.count, self.make = name, count, make

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, self.count, size):
            rows = range(start, min(start + size, self.count))
            yield {self.name: np.stack([self.make(row) for row in rows]).astype(np.float32)}
