"""Batches for training and evaluation: complete batches at a time, from memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from edgekd.data.augment import SampleRng
from edgekd.data.dataset import Array, Dataset, Preprocess, Split, is_image
from edgekd.data.transforms import (
    augmentations,
    check_mixing,
    mixed_classes,
    mixed_values,
    mixing,
    partner_rows,
    probe,
)
from edgekd.errors import InputError
from edgekd.spec import SAMPLE, VIEW

_PROBED = 8


class Loader:
    """Batches of one split: preprocessed inputs and targets, by name.

    An augmented image depends on the seeds, its row and its view only, to the last bit: not on
    the batch it is in, nor on the rows and the epoch it was reached by. With mixing, so do its
    targets: integer classes (B,) become probabilities (B, C) float32, all zero where either image
    has no label (-1). The partner is any row of the split, independent of ``rows``.

    Args:
        split: one of the dataset's splits, or its name.
        dataset: defines inputs, targets and preprocessing.
        batch_size: samples per batch.
        augment: ``data.augment``: applied to image inputs in :meth:`epoch` and :meth:`view`,
            never in :meth:`ordered`.
        channels_last: return images in torch's channels-last memory format.
        seed: from 0, below 2³¹. Loaders of other seeds augment differently, though
            :meth:`epoch` and :meth:`view` get the same seed.
        views: number of augmentations of each sample, used in turn by the epochs; None: each
            epoch has its own.
        rows: (R,) the rows of the split that :meth:`epoch` and :meth:`ordered` use, in this
            order; None: all.
        steps: batches per epoch; the rows are reshuffled and repeated as often as
            necessary. None: the number of full batches of the rows.
        classes: by the name of an integer target, how many it has: C of its probabilities when
            images are mixed. Left out: determined from the data.

    Raises:
        InputError: the split is unknown or empty, ``rows`` are not rows of it, or an
            augmentation does not fit.
    """

    def __init__(
        self,
        split: Split | str,
        dataset: Dataset,
        batch_size: int,
        augment: Sequence[str | Mapping[str, Mapping[str, Any]]] = (),
        channels_last: bool = False,
        *,
        seed: int = 0,
        views: int | None = None,
        rows: NDArray[np.int64] | None = None,
        steps: int | None = None,
        classes: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.split = dataset.splits[split] if isinstance(split, str) else split
        self.batch_size = batch_size
        self.views = views
        self._seed = seed
        self._steps = steps
        self._preprocess = dataset.preprocess
        self._channels_last = channels_last
        self._targets = [spec.name for spec in dataset.targets]
        self._names = [*(spec.name for spec in dataset.inputs), *self._targets]
        arrays = self.split.arrays
        self._images = [s.name for s in dataset.inputs if is_image(arrays[s.name])]
        self._augmentations = augmentations(augment)
        self._mixing = mixing(augment)
        if self.samples == 0:
            raise InputError("the split is empty", where=dataset.source, remedy="give samples")
        self.rows = _checked(rows, self.samples, dataset.source)
        if augment and not self._images:
            raise InputError(
                "there are augmentations, but no input is an image",
                where="data.augment",
                remedy="remove data.augment",
            )
        for name in self._images:
            images = torch.from_numpy(np.array(arrays[name][:_PROBED]))
            for augmentation in self._augmentations:
                probe(augmentation, images)
        if self._mixing is not None:
            self._classes = check_mixing(dataset, arrays, classes)
            rows_probed = np.arange(len(images))
            self._mixing(images, images, SampleRng(0, rows_probed, rows_probed))

    @property
    def samples(self) -> int:
        """Samples in the split; those of a batch are named by their row of it."""
        return len(self.split)

    @property
    def augmented(self) -> bool:
        """Whether different views of a sample differ."""
        return bool(self._augmentations) or self._mixing is not None

    def __len__(self) -> int:
        """Batches per :meth:`epoch`.

        Without ``steps`` the last partial one is dropped, unless it is the only one.
        """
        if self._steps is not None:
            return self._steps
        return max(1, len(self.rows) // self.batch_size)

    def epoch(self, seed: int, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Shuffled and augmented batches, the same ones for the same ``(seed, epoch)``.

        The order does not depend on the augmentations. Each batch also holds ``SAMPLE``, the rows
        in the split, and ``VIEW``, which augmentation of them this is: int64 (B,).

        Args:
            seed: from 0, below 2³¹.
            epoch: from 1.
        """
        order, views = self._order(seed, epoch)
        for start in range(0, len(order), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self._view(order[part], seed, views[part])

    def view(self, seed: int, view: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """One view of every sample of the split, in order; the last batch may be smaller.

        The same samples, bit-exact, as of :meth:`epoch` for this seed and view. All of
        the split, independent of ``rows``, so that the n-th sample is row n.

        Args:
            seed: as in :meth:`epoch`.
            view: from 0.
            start: the row to begin with.
        """
        for first in range(start, self.samples, self.batch_size):
            rows = np.arange(first, min(first + self.batch_size, self.samples))
            yield self._view(rows, seed, np.full(len(rows), view, np.int64))

    def ordered(self) -> Iterator[dict[str, Tensor]]:
        """The samples in order, not augmented; the last batch may be smaller."""
        for start in range(0, len(self.rows), self.batch_size):
            yield self._finished(self._raw(self.rows[start : start + self.batch_size]))

    def _order(self, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of an epoch, and which view of each: another one in each pass over them."""
        count = len(self) * self.batch_size
        if self._steps is None:
            count = min(count, len(self.rows))
        passes = -(-count // len(self.rows))
        orders, views = [], []
        for number in range(passes):
            state = np.random.SeedSequence([seed, epoch, number]).generate_state(1)
            shuffled = torch.randperm(
                len(self.rows), generator=Generator().manual_seed(int(state[0]))
            )
            orders.append(self.rows[shuffled.numpy()])
            view = (epoch - 1) * passes + number
            views.append(np.full(len(self.rows), view % self.views if self.views else view))
        return np.concatenate(orders)[:count], np.concatenate(views)[:count]

    def _view(
        self, rows: NDArray[np.int64], seed: int, views: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        batch = self._raw(rows)
        if self.augmented:
            draws = SampleRng(seed + (self._seed << 32), rows, views)
            for name in self._images:
                batch[name] = self._augment(batch[name], draws)
            if self._mixing is not None:
                self._mix(batch, rows, draws)
        batch = self._finished(batch)
        # Copies: the loader's own rows must not become a writable tensor.
        batch[SAMPLE], batch[VIEW] = torch.tensor(rows), torch.from_numpy(views)
        return batch

    def _augment(self, images: Tensor, draws: SampleRng) -> Tensor:
        for augmentation in self._augmentations:
            images = augmentation(images, draws)
        return images

    def _mix(self, batch: dict[str, Tensor], rows: NDArray[np.int64], draws: SampleRng) -> None:
        """Mix the batch's images and targets with their partners', in place."""
        assert self._mixing is not None
        arrays = self.split.arrays
        partners = partner_rows(rows, draws, self.samples)
        (image,) = self._images
        others = self._augment(_rows(arrays[image], partners), draws.branch())
        batch[image], share = self._mixing(batch[image], others, draws)
        for name in self._targets:
            own, other = batch[name], _rows(arrays[name], partners)
            batch[name] = (
                mixed_classes(own, other, share, self._classes[name])
                if name in self._classes
                else mixed_values(own, other, share)
            )

    def _raw(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        return {name: _rows(self.split.arrays[name], rows) for name in self._names}

    def _finished(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Preprocessed, in the configured memory format."""
        for name, constants in self._preprocess.items():
            batch[name] = preprocess(batch[name], constants)
        if self._channels_last:
            for name in self._images:
                batch[name] = batch[name].contiguous(memory_format=torch.channels_last)
        return batch


def preprocess(tensor: Tensor, constants: Preprocess) -> Tensor:
    """:meth:`Preprocess.apply` on a tensor: float32, equal to it within rounding."""
    mean, std = (torch.from_numpy(a) for a in constants.constants(tensor.ndim))
    if tensor.ndim == 1:
        mean, std = mean.reshape(()), std.reshape(())
    # Copies float32 too: the batch may share memory with the dataset.
    values = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return values.mul_(constants.scale).sub_(mean).div_(std)


def _rows(array: Array, rows: NDArray[np.int64]) -> Tensor:
    # take copies: a read-only mapping must not become a writable tensor.
    return torch.from_numpy(np.asarray(np.take(array, rows, axis=0)))


def _checked(rows: NDArray[np.int64] | None, samples: int, where: str) -> NDArray[np.int64]:
    """The rows to use.

    Raises:
        InputError: there are none, or they are not rows of the split.
    """
    if rows is None:
        return np.arange(samples)
    rows = np.asarray(rows)
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise InputError(
            f"the rows to use are {rows.dtype} {rows.shape}, not integers (R,)",
            where=where,
            remedy="give row numbers, e.g. numpy.flatnonzero(label >= 0)",
        )
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= samples:
        raise InputError(
            f"the rows to use go from {rows.min()} to {rows.max()}, and the split has {samples}"
            if len(rows)
            else "there are no rows to use",
            where=where,
            remedy=f"give rows from 0 to {samples - 1}",
        )
    return rows.astype(np.int64)
