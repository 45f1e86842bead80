"""Arrays that may be larger than memory: beyond a limit they live in an unnamed temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgekd.data.dataset import Array
from edgekd.errors import StageError

IN_MEMORY_BYTES = 512_000_000
CHUNK_BYTES = 16_000_000


def allocate(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """An uninitialised array, memory-mapped when it is larger than ``IN_MEMORY_BYTES``.

    Raises:
        StageError: there is no room for the temporary file.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    try:
        # The mapping outlives the closed file, whose disk space is freed with the array.
        with tempfile.TemporaryFile(prefix="edgekd-") as file:
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise StageError(
            f"no room for {size / 1e6:.0f} MB of samples: {error}",
            where=tempfile.gettempdir(),
            remedy="free space there, or set TMPDIR to a larger disk",
        ) from error


def chunks(array: Array) -> Iterator[tuple[int, Array]]:
    """Consecutive pieces of about ``CHUNK_BYTES`` along the first axis, each with its start."""
    row = max(1, array.nbytes // max(1, len(array)))
    step = max(1, CHUNK_BYTES // row)
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def take(array: Array, indices: NDArray[np.int64]) -> Array:
    """``array[indices]`` in bounded memory."""
    result = allocate((len(indices), *array.shape[1:]), array.dtype)
    for start, piece in chunks(result):
        piece[...] = array[indices[start : start + len(piece)]]
    return result
