"""The teacher cache on disk: records in blocks, each with a checksum, safe against a kill at any
time.

A folder holds

- ``answers.bin``: the records of view 0, sample after sample, then those of view 1, …;
- ``blocks.bin``: per block of a view's samples how many were written and their CRC-32, 8 bytes;
- ``header.json``: what the outputs depend on, readable and as a check;
- ``.lock``: held by the writer. Readers need no lock.

A block's checksum is written after its records have reached the disk, and covers the cache's
key and the block's place too: a block that is half written, truncated, corrupt, in the wrong place
or of another cache is never used.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from edgekd.errors import InputError
from edgekd.files import write_errors, write_whole

SCHEMA = "edgekd.teacher-cache/1"
ANSWERS, BLOCKS, HEADER, LOCK = "answers.bin", "blocks.bin", "header.json", ".lock"

_ENTRY = np.dtype([("samples", "<u4"), ("crc", "<u4")])
_BLOCK_BYTES = 4 << 20
_OUTPUTS = "the teacher's outputs"


class CacheStore:
    """The records of one cache. It holds no state: each call reads the disk.

    Args:
        folder: the folder of this cache alone.
        key: the SHA-256 of everything the outputs depend on.
        record_bytes: size of one sample in one view.
        samples: number of samples in each view.
        block_samples: at most this many samples share a checksum; fewer when records are large.
    """

    def __init__(
        self, folder: Path, key: str, record_bytes: int, samples: int, block_samples: int
    ) -> None:
        self.folder = folder
        self.key = key
        self.record_bytes = record_bytes
        self.samples = samples
        self.block_samples = max(1, min(block_samples, _BLOCK_BYTES // record_bytes))
        self.blocks_per_view = -(-samples // self.block_samples)
        self.path = folder / ANSWERS

    def place(self, block: int) -> tuple[int, int, int]:
        """(view, first sample, the sample after its last) of a block."""
        view, number = divmod(block, self.blocks_per_view)
        start = number * self.block_samples
        return view, start, min(start + self.block_samples, self.samples)

    def length(self, block: int) -> int:
        """The samples of a block."""
        _, start, stop = self.place(block)
        return stop - start

    def describe(self, block: int) -> str:
        """A block's name for messages."""
        view, start, stop = self.place(block)
        return f"the teacher cache's block {block} (view {view}, samples {start} to {stop - 1})"

    def header_fits(self) -> bool:
        """Whether the folder has a header with this key.

        Raises:
            InputError: the header has another key, or is damaged.
        """
        path = self.folder / HEADER
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if header["schema"] != SCHEMA:
                raise ValueError(f"its schema is {header['schema']!r}, not {SCHEMA!r}")
            if header["key"] != self.key:
                raise ValueError(f"its outputs have the key {header['key']}, not {self.key}")
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the teacher cache cannot be used: {error}",
                where=str(path),
                remedy="remove its folder; the next run runs the teacher again",
            ) from error
        return True

    def write_header(self, content: Mapping[str, Any]) -> None:
        """Write the header, atomically; call it under :meth:`writing`."""
        header = {
            "schema": SCHEMA,
            "key": self.key,
            **content,
            "samples": self.samples,
            "record_bytes": self.record_bytes,
            "block_samples": self.block_samples,
        }
        text = json.dumps(header, indent=1, ensure_ascii=False) + "\n"
        path = self.folder / HEADER
        write_whole(path, text, _OUTPUTS, self._full_remedy(), durable=True)

    def missing(self, views: int) -> list[int]:
        """The blocks of the first ``views`` views that were not written or are truncated.

        The records themselves are not read: see :meth:`read`.
        """
        entries = self._entries(0, views * self.blocks_per_view)
        size = self.path.stat().st_size if self.path.is_file() else 0
        return [
            block
            for block, written in enumerate(entries["samples"].tolist())
            if not written or self._offset(block) + self._bytes(block) > size
        ]

    def views_begun(self) -> int:
        """Number of views on disk."""
        return -(-len(self._entries(0, None)) // self.blocks_per_view)

    def read(self, block: int) -> bytes | None:
        """A block's records, if it was written and reads as it was written."""
        entry = self._entries(block, 1)[0]
        content = _read(self.path, self._offset(block), self._bytes(block))
        whole = (
            entry["samples"] == self.length(block)
            and len(content) == self._bytes(block)
            and entry["crc"] == self._crc(block, content)
        )
        return content if whole else None

    def take(self, rows: Sequence[int]) -> bytes | None:
        """The records of these rows (view · samples + sample), or None when some are truncated.

        Each is read by itself: a mapping would keep every page it touched resident, 1.3 GB of a
        cache of 1.6 GB, and truncating a mapped file kills the process.
        """
        size = self.record_bytes
        try:
            with self.path.open("rb", buffering=0) as file:
                number = file.fileno()
                taken = b"".join([os.pread(number, size, row * size) for row in rows])
        except OSError:
            return None
        return taken if len(taken) == len(rows) * size else None

    def write(self, block: int, content: bytes) -> None:
        """Write a block's records, then its checksum; call it under :meth:`writing`.

        Raises:
            StageError: they cannot be written. Every other block stays valid.
        """
        entry = np.array((self.length(block), self._crc(block, content)), _ENTRY)
        with self._write_errors():
            _write(self.path, self._offset(block), content, durable=True)
            # Not flushed: a checksum lost in a power cut only costs the block.
            _write(self.folder / BLOCKS, block * _ENTRY.itemsize, entry.tobytes(), durable=False)

    @contextmanager
    def writing(self, wait: Callable[[str], None]) -> Iterator[None]:
        """The write lock, for one process and thread at a time.

        Args:
            wait: receives a message when another process holds the lock.

        Raises:
            StageError: the folder cannot be made or written.
        """
        with self._write_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                wait(f"another run writes the teacher cache {self.folder}: waiting for it")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with write_errors(self.folder, _OUTPUTS, self._full_remedy()):
                raise

    def _full_remedy(self) -> str:
        cached = int(self._entries(0, None)["samples"].sum())
        return (
            "free space on the disk, or name another folder in distill.cache.folder; "
            f"{cached} outputs are cached, and the next run computes only the others"
        )

    def _entries(self, start: int, count: int | None) -> NDArray[np.void]:
        length = None if count is None else count * _ENTRY.itemsize
        content = _read(self.folder / BLOCKS, start * _ENTRY.itemsize, length)
        whole = len(content) // _ENTRY.itemsize
        entries = np.zeros(whole if count is None else count, _ENTRY)
        entries[:whole] = np.frombuffer(content, _ENTRY, whole)
        return entries

    def _offset(self, block: int) -> int:
        view, start, _ = self.place(block)
        return (view * self.samples + start) * self.record_bytes

    def _bytes(self, block: int) -> int:
        return self.length(block) * self.record_bytes

    def _crc(self, block: int, content: bytes) -> int:
        return zlib.crc32(content, zlib.crc32(f"{self.key}/{block}".encode()))


def _read(path: Path, offset: int, length: int | None) -> bytes:
    """The bytes read, possibly fewer than requested; empty where the file cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError:
        return b""


def _write(path: Path, offset: int, content: bytes, *, durable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - opened without truncating it
        file.seek(offset)
        file.write(content)
        file.flush()
        if durable:
            os.fsync(descriptor)
