"""The IDX format of MNIST-like datasets: a magic number, big-endian sizes, then the bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import InputError

_UNSIGNED_BYTE = 0x08


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed when its name ends in ``.gz``.

    Raises:
        InputError: the file cannot be read, or the gzip stream is corrupt or cut off.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), remedy="check it"
        ) from error
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"the gzip file is corrupt or cut off after {len(content)} bytes: {error}",
            where=str(path),
            remedy="get the file again",
        ) from error


def parse_idx(content: bytes, dimensions: int, where: str) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes.

    Args:
        content: the decompressed file.
        dimensions: how many axes there must be: 3 for images (N, H, W), 1 for labels (N,).
        where: the file, for the error.

    Raises:
        InputError: no IDX file of bytes, another number of axes, or not as long as it says.
    """
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise InputError(
            f"this is no IDX file of bytes with {dimensions} axes: it starts with "
            f"{content[:4].hex() or 'nothing'}, not {magic.hex()}",
            where=where,
            remedy="check that images and labels are not exchanged, or get the file again",
        )
    shape = tuple(int(n) for n in np.frombuffer(content[4:header], ">u4", min(
        dimensions, max(0, len(content) - 4) // 4)))  # fmt: skip
    expected = header + math.prod(shape)
    if len(shape) < dimensions or len(content) != expected:
        size = " x ".join(map(str, shape))
        raise InputError(
            f"the IDX file holds {len(content)} bytes, but "
            + (f"{size} values need {expected}" if len(shape) == dimensions else
               f"its header alone needs {header}"),
            where=where,
            remedy="get the file again: it is cut off or damaged",
        )  # fmt: skip
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
