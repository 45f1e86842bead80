"""npz archives: written uncompressed, and read after the size and header of an array were checked.

Nothing is ever unpickled.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Mapping, NoReturn, Optional, Tuple, Type, Union

import numpy as np

from edgerun.errors import BadInput
from edgerun.files import ErrorType, require_regular_file
from edgerun.limits import MEMORY, memory_limit

MOST_ARRAYS = 10_000

_LARGE, _RATIO = 1 << 30, 200
"""An array of this many bytes that is packed better than this ratio is a decompression bomb."""


def write_npz(file: Union[Path, IO[bytes]], arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write arrays by name, uncompressed, as ``numpy.load`` reads them.

    Raises:
        OSError: the file cannot be written.
        ValueError: an array holds Python objects.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


@dataclass(frozen=True)
class ArrayHeader:
    """The declared form of an array in a file."""

    shape: Tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def nbytes(self) -> int:
        """The size of the elements."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def read_header(stream: IO[bytes]) -> ArrayHeader:
    """The header of an .npy stream, which is then at its elements.

    Raises:
        ValueError: it is none; numpy's parser raises other errors for damaged ones.
    """
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"there is no version {version} of the format")
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if any(length < 0 for length in shape):
        raise ValueError(f"its shape is {shape}")
    return ArrayHeader(shape, dtype, fortran)


class NpzFile:
    """An open npz file; a context manager.

    Args:
        path: the file.
        error: the kind of error to raise.

    Attributes:
        names: the arrays, in the order of the file.

    Raises:
        BadInput: (or ``error``) the file does not exist, is no regular file or no npz file, has
            more than :data:`MOST_ARRAYS` arrays, or two of one name.
    """

    def __init__(self, path: Path, error: ErrorType = BadInput) -> None:
        self._path = path
        self._error = error
        self._bytes = 0
        # Asked once: what is read here is no longer available.
        self._memory = memory_limit()
        remedy = "write it with numpy.savez(path, NAME=array)"
        require_regular_file(path, remedy, error)
        try:
            with path.open("rb") as file:
                start = file.read(6)
            self._archive = zipfile.ZipFile(path)
        except FileNotFoundError as problem:
            raise error("there is no such file", where=str(path), remedy="check it") from problem
        except Exception as problem:
            what = "this is not an npz file, or it is truncated"
            if start == b"\x93NUMPY":
                what = "this is a single array, not an npz file"
            elif not start:
                what = "this is not an npz file: the file is empty"
            raise error(what, where=str(path), remedy=remedy) from problem
        members = self._archive.infolist()
        self._members = {
            m.filename[:-4] if m.filename.endswith(".npy") else m.filename: m for m in members
        }
        self.names = tuple(self._members)
        if len(members) > MOST_ARRAYS:
            what = f"the file has {len(members):,} arrays, and {MOST_ARRAYS:,} are the most"
            self._refuse(what, "save the samples of one name as one array")
        if len(self.names) < len(members):
            self._refuse("the file has two arrays of one name", remedy)

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        problem: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._archive.close()

    def open(self, name: str) -> Tuple[ArrayHeader, IO[bytes]]:
        """An array's header, and the stream of its elements, to be closed by the caller.

        Raises:
            BadInput: the array is damaged or encrypted, or declares more than the file has.
        """
        member = self._members[name]
        try:
            stream = self._archive.open(member)
            header = read_header(stream)
            found = member.file_size - stream.tell()
            if not header.dtype.hasobject and header.nbytes > found:
                raise ValueError(f"{header.shape} of {header.dtype} is more than its {found} bytes")
        except Exception as problem:  # of zipfile, zlib or numpy's parser: of many kinds
            self._refuse_damaged(name, problem)
        return header, stream

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """An array, in the byte order of the machine.

        Raises:
            BadInput: as :meth:`open`; it holds Python objects; it does not fit into the memory
                with those read before, or is a decompression bomb.
        """
        header, stream = self.open(name)
        with stream:
            if header.dtype.hasobject:
                self._refuse(
                    f"the array {name!r} cannot be read: it holds pickled objects",
                    "save plain numbers: arrays of objects are pickles, which are refused",
                )
            self._refuse_large(name, header.nbytes)
            try:
                stream.seek(0)
                array = np.lib.format.read_array(stream, allow_pickle=False)
            except Exception as problem:
                self._refuse_damaged(name, problem)
        found: np.ndarray[Any, Any] = array
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    def _refuse_large(self, name: str, size: int) -> None:
        self._bytes += size
        packed = self._members[name].compress_size
        if self._memory is not None and self._bytes > self._memory:
            self._refuse(
                f"the arrays up to {name!r} need {self._bytes / 1e6:,.0f} MB, more than the "
                f"{self._memory / 1e6:,.0f} MB of memory that may be used",
                f"save fewer or smaller samples, free memory, or allow more with {MEMORY}",
            )
        if size > _LARGE and size > _RATIO * packed:
            self._refuse(
                f"the array {name!r} has {packed:,} bytes in the file and {size:,} unpacked",
                "save it with numpy.savez, uncompressed, if it is meant",
            )

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        self._archive.close()
        raise self._error(what, where=str(self._path), remedy=remedy)

    def _refuse_damaged(self, name: str, problem: Exception) -> NoReturn:
        self._archive.close()
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise self._error(
            f"the file is damaged at array {name!r}: {reason}",
            where=str(self._path),
            remedy="write it again with numpy.savez; it is no complete npz file",
        ) from problem
