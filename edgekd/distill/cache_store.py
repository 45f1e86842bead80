"""The teacher cache on disk: records in blocks, each with a checksum, safe against a kill at any
time.

A folder holds

- ``answers.bin``: the records of view 0, sample after sample, then those of view 1, …;
- ``blocks.bin``: per block of a view's samples how many were written and their CRC-32, 8 bytes;
- ``header.json``: what the outputs depend on, readable and as a check;
- ``.lock``: held by the writer. Readers need no lock.

A block's checksum is written after its records have reached the disk, and covers the cache's
key and the block's number too: a block that is half written, truncated, corrupt, in the wrong place
or of another cache is never used.

A record has a fixed size. Class logits are stored as the k largest, so that the temperature stays
free (FKD and TinyViT fix it in), and the logsumexp of the others, so that no probability is
lost.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from edgekd.errors import InputError, StageError
from edgekd.files import write_errors, write_whole
from edgekd.spec import TensorSpec

SCHEMA = "edgekd.teacher-cache/1"
OUTPUTS, BLOCKS, HEADER, LOCK = "answers.bin", "blocks.bin", "header.json", ".lock"

_ENTRY = np.dtype([("samples", "<u4"), ("crc", "<u4")])
_BLOCK_BYTES = 4 << 20
_OUTPUTS = "the teacher's outputs"


Records = NDArray[np.void]
Json = dict[str, Any]

_LOWEST = float(np.finfo(np.float16).min)
"""Replaces every logit further than this below the largest: its probability is 0 either way,
and a loss stays finite."""


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
        self.path = folder / OUTPUTS

    def span(self, block: int) -> tuple[int, int, int]:
        """(view, first sample, the sample after its last) of a block."""
        view, number = divmod(block, self.blocks_per_view)
        start = number * self.block_samples
        return view, start, min(start + self.block_samples, self.samples)

    def length(self, block: int) -> int:
        """The samples of a block."""
        _, start, stop = self.span(block)
        return stop - start

    def describe(self, block: int) -> str:
        """A block's name for messages."""
        view, start, stop = self.span(block)
        return f"the teacher cache's block {block} (view {view}, samples {start} to {stop - 1})"

    def header_fits(self) -> bool:
        """Whether the folder has a whole header with this key; blocks are checked on their own.

        Raises:
            InputError: the header cannot be read.
        """
        path = self.folder / HEADER
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            return bool(header["schema"] == SCHEMA and header["key"] == self.key)
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return False
        except OSError as error:
            raise InputError(
                f"the teacher cache cannot be used: {error}",
                where=str(path),
                remedy="remove its folder; the next run runs the teacher again",
            ) from error

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
        view, start, _ = self.span(block)
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


class LogitCodec:
    """The layout of the outputs in a record, little-endian.

    Class logits (..., C) take, at each position: the ``top`` largest logits as their class
    (uint16, or uint32 above 65,536 classes) and float16 of their distance to the largest;
    float16 of the others' logsumexp, as a distance too; float32 of the largest. With 10 of 1000
    classes that is 46 bytes. Everything else, and logits that are no larger uncompressed (C ≤ top
    among them), is plain float32.

    Args:
        outputs: the outputs to store, batch dimension first, the other dimensions fixed.
        logits: the names of those that are class logits, classes last.
        top: k.

    Raises:
        InputError: a dimension is not fixed, or a name in ``logits`` is not an output.
    """

    def __init__(
        self, outputs: Sequence[TensorSpec], logits: Collection[str] = (), top: int = 10
    ) -> None:
        unknown = sorted(set(logits) - {spec.name for spec in outputs})
        if unknown:
            raise InputError(f"the teacher has no output named {', '.join(unknown)}")
        if top < 1:
            raise InputError(f"{top} is not a number of logits to store", where="distill.cache.top")
        self.outputs = tuple(outputs)
        self.top = top
        self._shapes = {spec.name: _fixed(spec) for spec in outputs}
        top_k = {name: _top_k(self._shapes[name][-1], top) for name in logits}
        self._shortened = {
            name for name, kind in top_k.items() if kind.itemsize < 4 * self._shapes[name][-1]
        }
        self.dtype = np.dtype(
            [
                (name, top_k[name], shape[:-1])
                if name in self._shortened
                else (name, np.dtype("<f4"), shape)
                for name, shape in self._shapes.items()
            ]
        )

    def to_json(self) -> list[Json]:
        """The outputs, their shapes per sample and how they are stored, readable and for the cache
        key.
        """
        return [
            {
                "name": name,
                "shape": list(shape),
                "kept": f"top {self.top}" if name in self._shortened else "float32",
            }
            for name, shape in self._shapes.items()
        ]

    def encode(self, outputs: Mapping[str, Tensor], view: int = 0, start: int = 0) -> Records:
        """The records (B,) of a batch's outputs.

        Args:
            outputs: by name, (B, ...); other names are ignored.
            view: for error messages, like ``start``, the number of the first sample.

        Raises:
            InputError: an output is missing or has another shape.
            StageError: an output is NaN, or its largest value is infinite.
        """
        count = len(next(iter(outputs.values()))) if outputs else 0
        records = np.zeros(count, self.dtype)
        for name, shape in self._shapes.items():
            given = list(outputs[name].shape) if name in outputs else "nothing"
            if given != [count, *shape]:
                raise InputError(
                    f"the teacher outputs {name} as {given}, and the cache stores it as "
                    f"{[count, *shape]}",
                    remedy="declare the outputs that the teacher has",
                )
            values = outputs[name].detach().to(torch.float32)
            shortened = name in self._shortened
            # The largest of values with a NaN among them is NaN.
            largest = values.amax(dim=-1) if shortened else values.reshape(count, -1).amax(dim=1)
            bad = ~largest.reshape(count, -1).isfinite().all(dim=1)
            if bad.any():
                sample = start + int(bad.nonzero()[0])
                raise StageError(
                    f"the teacher's {name} for sample {sample} in view {view} is NaN or infinite",
                    remedy="check this sample, and at the teacher's weights and precision",
                )
            if shortened:
                _shorten(values, largest, records[name])
            else:
                records[name] = values.cpu().numpy()
        return records

    def decode(self, records: Records, device: torch.device) -> dict[str, Tensor]:
        """The outputs (B, ...) of records, float32, in newly allocated memory.

        Plain float32 values are restored exactly. Of shortened logits the k largest are restored
        within float16: a relative 2⁻¹¹ of their distance to the largest, which is exact. The
        others share the rest evenly: softmax at T = 1 gives all of them together their
        probability; at another T the share of each is an estimate.
        """
        return {
            name: _lengthen(records[name], shape[-1], device)
            if name in self._shortened
            else torch.from_numpy(np.array(records[name], np.float32)).to(device)
            for name, shape in self._shapes.items()
        }

    def as_tensors(self, records: Records) -> dict[str, Tensor] | None:
        """The outputs (N, ...) of records as float32 tensors that share their memory.

        None where an output is shortened: it has to be decoded.
        """
        if self._shortened:
            return None
        return {name: torch.from_numpy(records[name]) for name in self._shapes}


def _fixed(spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(size for size in spec.sample_shape if isinstance(size, int))
    if len(shape) != len(spec.sample_shape) or 0 in shape:
        raise InputError(
            f"the teacher's output {spec} has no fixed size, and the cache's records do",
            where="distill.cache",
            remedy="set distill.cache: false",
        )
    return shape


def _top_k(classes: int, top: int) -> np.dtype[np.void]:
    index = "<u2" if classes <= 1 << 16 else "<u4"
    return np.dtype(
        [("index", index, (top,)), ("below", "<f2", (top,)), ("rest", "<f2"), ("largest", "<f4")]
    )


def _shorten(logits: Tensor, largest: Tensor, out: Records) -> None:
    top, index = logits.topk(out.dtype["index"].shape[0], dim=-1)
    # Subtracting the top's share from 1 would cancel where the rest is small.
    rest = logits.scatter(-1, index, -math.inf).logsumexp(dim=-1)
    out["index"] = index.cpu().numpy()
    out["below"] = (top - largest[..., None]).clamp_min(_LOWEST).cpu().numpy()
    out["rest"] = (rest - largest).clamp_min(_LOWEST).cpu().numpy()
    out["largest"] = largest.cpu().numpy()


def _lengthen(records: Records, classes: int, device: torch.device) -> Tensor:
    # The short form is copied to the device and expanded there.
    index = torch.from_numpy(records["index"].astype(np.int64)).to(device)
    below, rest, largest = (
        torch.from_numpy(records[field].astype(np.float32)).to(device)
        for field in ("below", "rest", "largest")
    )
    # Rounded to float16 the rest could overtake the top, and become the teacher's prediction.
    each = torch.minimum(rest - math.log(classes - index.shape[-1]), below.amin(dim=-1))
    dense = (largest + each)[..., None].repeat(*[1] * each.ndim, classes)
    return dense.scatter_(-1, index, largest[..., None] + below)
