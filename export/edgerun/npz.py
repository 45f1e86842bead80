"""Arrays in an npz file, whatever their names: numpy's own ``savez`` takes none named ``file``."""

from __future__ import annotations

import zipfile
from typing import IO, Any, Mapping

import numpy as np


def write_npz(file: IO[bytes], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write arrays by name, uncompressed, as ``numpy.load`` reads them.

    Raises:
        OSError: the file cannot be written.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array))
