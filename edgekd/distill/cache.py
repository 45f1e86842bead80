"""The teacher cache: a teacher is run once for each view of each sample.

:func:`fill_cache` computes what is missing; the teacher that it returns reads from disk. A folder
may be shared by several, also concurrent, runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from shutil import disk_usage
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.distill.cache_store import SCHEMA, CacheStore, LogitCodec, Records
from edgekd.distill.teacher import Teacher
from edgekd.errors import InputError, StageError
from edgekd.files import json_sha256
from edgekd.progress import Progress
from edgekd.spec import SAMPLE, VIEW, TensorSpec

BLOCK_SAMPLES = 4096
HELD_BYTES = 64 << 20
"""Largest cache, in bytes, that is held in memory once it is read: per process and per
teacher of an ensemble."""


class ViewSource(Protocol):
    """A source that can reproduce an augmentation of a sample."""

    @property
    def samples(self) -> int:
        """Samples of each view."""
        ...

    def view(self, seed: int, view: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """All samples from row ``start`` in their order, augmented as this view."""
        ...


def fill_cache(
    teacher: Teacher,
    loader: ViewSource,
    root: Path,
    *,
    outputs: Sequence[TensorSpec],
    logits: Collection[str] = (),
    views: int,
    top: int,
    seed: int,
    data: str,
    augment: Any = (),
    preprocess: Any = None,
    progress: Progress,
    block_samples: int = BLOCK_SAMPLES,
) -> CachedTeacher:
    """Run the teacher for each (sample, view) that is not yet on disk.

    The outputs are in ``root/<first 16 digits of their key>``; the key covers everything that
    they depend on, so that a changed teacher, preprocessing or data set never reads stale outputs.
    Further views are added to an existing cache. A kill at any moment loses at most the unfinished
    block.

    Args:
        teacher: run here, and again where a block turns out to be damaged later.
        loader: the training samples.
        root: the folder of all caches; created if missing.
        outputs: the outputs to store, batch dimension first.
        logits: the names of the outputs that are class logits, and may be shortened.
        views: how many augmentations of each sample.
        top: number of the largest class logits stored; see :class:`LogitCodec`.
        seed: of the augmentations.
        data: the training data's fingerprint.
        augment: the augmentations' configuration, as JSON.
        preprocess: how raw data become inputs, as JSON.
        progress: receives the number of finished samples, and a message when another run is waited
            for.
        block_samples: samples that share a checksum.

    Returns:
        The teacher that reads its outputs from disk.

    Raises:
        InputError: an output is missing or of another shape; the folder holds something else.
        StageError: an output is NaN or infinite; the disk is too small or cannot be written.
    """
    codec = LogitCodec(outputs, logits, top)
    parts = {
        "teacher": teacher.digest,
        "data": data,
        "samples": loader.samples,
        "augment": augment,
        "preprocess": preprocess,
        "seed": seed,
        "top": top,
        "outputs": codec.to_json(),
        "block_samples": block_samples,
    }
    key = json_sha256({**parts, "schema": SCHEMA})
    folder = root.resolve() / key[:16]
    store = CacheStore(folder, key, codec.dtype.itemsize, loader.samples, block_samples)
    cached = CachedTeacher(teacher, loader, codec, store, seed, views, progress)
    if not store.header_fits() or store.missing(views):
        with store.writing(progress.message):
            # Checked again: the previous holder of the lock may have filled it.
            store.header_fits()
            missing = store.missing(views)
            _check_disk_space(store, missing)
            store.write_header({**parts, "views": max(views, store.views_begun())})
            progress.start("teacher's outputs", sum(map(store.length, missing)), "sample")
            try:
                cached.fill(missing, progress.advance)
            finally:
                progress.finish()
    return cached


class CachedTeacher:
    """A teacher's outputs read from disk; made by :func:`fill_cache`.

    Each block's checksum is verified when the first of its records is read. A damaged block is
    recomputed by the teacher immediately. A small cache stays in memory once it is read; of a large
    one each record is read when it is needed.
    """

    def __init__(
        self,
        teacher: Teacher,
        loader: ViewSource,
        codec: LogitCodec,
        store: CacheStore,
        seed: int,
        views: int,
        progress: Progress,
    ) -> None:
        self.digest = teacher.digest
        self.folder = store.folder
        self._teacher, self._loader, self._seed = teacher, loader, seed
        self._codec, self._store = codec, store
        self._views = views
        self._progress = progress
        self._verified = np.zeros(views * store.blocks_per_view, np.bool_)
        records = views * store.samples
        small = records * store.record_bytes <= HELD_BYTES
        self._held = np.empty(records, codec.dtype) if small else None
        self._unverified = len(self._verified)

    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of each sample's view by name, float32, on the batch's device.

        Raises:
            InputError: the batch does not say which samples and views it holds, or one of them
                is not in the cache.
            StageError: a damaged block could not be replaced.
        """
        if SAMPLE not in batch or VIEW not in batch:
            raise InputError(
                f"the batch lacks {SAMPLE} or {VIEW}: the cached outputs cannot be identified",
                remedy="use the cache for training batches only",
            )
        if self._unverified == 0 and (outputs := self._stored(batch)) is not None:
            return outputs
        samples = _within(batch[SAMPLE], self._store.samples, "sample", self.folder)
        views = _within(batch[VIEW], self._views, "view", self.folder)
        blocks = views * self._store.blocks_per_view + samples // self._store.block_samples
        records = self._records(views * self._store.samples + samples, blocks)
        return self._codec.decode(records, batch[SAMPLE].device)

    def capture(self, layers: Collection[str]) -> None:
        """Refuse layers: the cache has outputs only (raises InputError)."""
        if layers:
            raise InputError(
                f"the teacher cache has outputs only, and layers are needed: {', '.join(layers)}",
                where="distill.cache",
                remedy="set distill.cache: false, or use losses on the teacher's outputs",
            )

    def _stored(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The outputs by one indexing operation each, where the complete cache is in memory as
        float32; None: not there, or a number out of range.

        A student's step takes few milliseconds, of which each small operation costs a part.
        """
        if self._stored_outputs is None:
            return None
        lowest, highest = torch.aminmax(batch[SAMPLE])
        if lowest.item() < 0 or highest.item() >= self._store.samples:
            return None
        rows = torch.add(batch[SAMPLE], batch[VIEW], alpha=self._store.samples)
        try:
            return {name: t.index_select(0, rows) for name, t in self._stored_outputs.items()}
        except IndexError:  # A view out of range: :meth:`predict` names it.
            return None

    @cached_property
    def _stored_outputs(self) -> dict[str, Tensor] | None:
        return None if self._held is None else self._codec.as_tensors(self._held)

    def _records(self, rows: NDArray[np.int64], blocks: NDArray[np.int64]) -> Records:
        for _ in range(2):
            for block in np.unique(blocks[~self._verified[blocks]]).tolist():
                self._verify(block)
            if self._held is not None:
                return self._held[rows]
            taken = self._store.take(rows.tolist())
            if taken is not None:
                return np.frombuffer(taken, self._codec.dtype)
            # Truncated or removed since it was verified.
            self._verified[:] = False
            self._unverified = len(self._verified)
        raise self._unreadable("the teacher cache")

    def _verify(self, block: int) -> None:
        content = self._store.read(block)
        if content is None:
            with self._store.writing(self._progress.message):
                if self._store.read(block) is None:
                    self._progress.message(
                        f"{self._store.describe(block)} is damaged: running the teacher again"
                    )
                    self.fill([block], lambda n: None)
            content = self._store.read(block)
        if content is None:
            raise self._unreadable(self._store.describe(block))
        if self._held is not None:
            view, start, stop = self._store.span(block)
            first = view * self._store.samples
            self._held[first + start : first + stop] = np.frombuffer(content, self._held.dtype)
        self._verified[block] = True
        self._unverified = int(np.count_nonzero(~self._verified))

    def fill(self, blocks: Sequence[int], done: Callable[[int], None]) -> None:
        """Compute these blocks, ascending, and write each as soon as it is complete."""
        per_view = self._store.blocks_per_view
        # Within a run of consecutive blocks, sample number minus position is constant.
        runs = groupby(enumerate(blocks), lambda pair: (pair[1] // per_view, pair[1] - pair[0]))
        for _, run in runs:
            neighbours = [block for _, block in run]
            held = np.zeros(0, self._codec.dtype)
            for records in self._compute(neighbours[0], neighbours[-1]):
                held = np.concatenate([held, records])
                while neighbours and len(held) >= self._store.length(neighbours[0]):
                    block = neighbours.pop(0)
                    whole, held = np.split(held, [self._store.length(block)])
                    self._store.write(block, whole.tobytes())
                done(len(records))

    @torch.no_grad()
    def _compute(self, first: int, last: int) -> Iterator[Records]:
        view, at, _ = self._store.span(first)
        _, _, stop = self._store.span(last)
        for batch in self._loader.view(self._seed, view, start=at):
            rows = batch[SAMPLE][: stop - at]
            expected = torch.arange(at, at + len(rows), device=rows.device)
            if not torch.equal(rows, expected) or (batch[VIEW] != view).any():
                break
            wanted = {name: tensor[: len(rows)] for name, tensor in batch.items()}
            yield self._codec.encode(self._teacher.predict(wanted), view, at)
            at += len(rows)
            if at == stop:
                return
        raise StageError(
            f"the loader did not return sample {at} of view {view} in order",
            remedy="report this: view() must return all samples from its start, in order",
        )

    def _unreadable(self, what: str) -> StageError:
        return StageError(
            f"{what} does not read as it was written",
            where=str(self._store.path),
            remedy="check the disk, or name another folder in distill.cache.folder",
        )


def _check_disk_space(store: CacheStore, blocks: Sequence[int]) -> None:
    needed = sum(map(store.length, blocks)) * store.record_bytes
    free = disk_usage(store.folder).free
    if needed > free:
        raise StageError(
            f"the teacher's outputs need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free",
            where=str(store.folder),
            remedy="free space, name another folder in distill.cache.folder, or lower "
            "distill.cache.views or distill.cache.top",
        )


def _within(numbers: Tensor, count: int, what: str, folder: Path) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = numbers.cpu().numpy()
    outside = rows[(rows < 0) | (rows >= count)]
    if len(outside):
        raise InputError(
            f"{what} {outside[0]} is not in the teacher cache, which has {what}s 0 to {count - 1}",
            where=str(folder),
            remedy="fill the cache for the data and views that are trained with",
        )
    return rows
