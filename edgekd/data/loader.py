"""Batches for training and evaluation: whole batches at a time, from memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from edgekd.data.dataset import Array, Dataset, Preprocess, Split, is_image
from edgekd.data.transforms import augmentations, probe
from edgekd.errors import InputError


class Loader:
    """Batches of one split: preprocessed inputs and targets, by name.

    Args:
        split: one of the dataset's splits, or its name.
        dataset: says what is an input, what a target, and how inputs are preprocessed.
        batch_size: samples per batch.
        augment: ``data.augment``: applied to image inputs in :meth:`epoch`, never in
            :meth:`ordered`.
        channels_last: give images in torch's channels-last memory format.

    Raises:
        InputError: the split is unknown or empty, or an augmentation does not fit.
    """

    def __init__(
        self,
        split: Split | str,
        dataset: Dataset,
        batch_size: int,
        augment: Sequence[str | Mapping[str, Mapping[str, Any]]] = (),
        channels_last: bool = False,
    ) -> None:
        self.split = dataset.splits[split] if isinstance(split, str) else split
        self.batch_size = batch_size
        self._preprocess = dataset.preprocess
        self._channels_last = channels_last
        self._names = [spec.name for spec in (*dataset.inputs, *dataset.targets)]
        arrays = self.split.arrays
        self._images = [s.name for s in dataset.inputs if is_image(arrays[s.name])]
        self._augmentations = augmentations(augment)
        if self.samples == 0:
            raise InputError("the split is empty", where=dataset.source, remedy="give samples")
        if augment and not self._images:
            raise InputError(
                "there are augmentations, but no input is an image",
                where="data.augment",
                remedy="remove data.augment",
            )
        for name in self._images:
            images = torch.from_numpy(np.array(arrays[name][:2]))
            for augmentation in self._augmentations:
                probe(augmentation, images)

    @property
    def samples(self) -> int:
        """Samples in the split."""
        return len(self.split)

    def __len__(self) -> int:
        """Batches per :meth:`epoch`: the last partial one is dropped, unless it is the only one."""
        return max(1, self.samples // self.batch_size)

    def epoch(self, seed: int, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Shuffled and augmented batches, the same ones for the same ``(seed, epoch)``.

        The order does not depend on the augmentations.
        """
        # Two streams, so that adding an augmentation does not change the batches' samples.
        order_seed, augment_seed = np.random.SeedSequence([seed, epoch]).generate_state(2)
        order = torch.randperm(
            self.samples, generator=Generator().manual_seed(int(order_seed))
        ).numpy()
        generator = Generator().manual_seed(int(augment_seed))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._batch(order[start : start + self.batch_size], generator)

    def ordered(self) -> Iterator[dict[str, Tensor]]:
        """All samples in their order, not augmented; the last batch may be smaller."""
        for start in range(0, self.samples, self.batch_size):
            yield self._batch(slice(start, start + self.batch_size), None)

    def _batch(
        self, rows: NDArray[np.int64] | slice, generator: Generator | None
    ) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in self._names:
            tensor = _rows(self.split.arrays[name], rows)
            is_input_image = name in self._images
            if generator is not None and is_input_image:
                for augmentation in self._augmentations:
                    tensor = augmentation(tensor, generator)
            if name in self._preprocess:
                tensor = preprocess(tensor, self._preprocess[name])
            if is_input_image and self._channels_last:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            batch[name] = tensor
        return batch


def preprocess(tensor: Tensor, constants: Preprocess) -> Tensor:
    """:meth:`Preprocess.apply` on a tensor: float32, equal to it within rounding."""
    mean, std = (torch.from_numpy(a) for a in constants.constants(tensor.ndim))
    if tensor.ndim == 1:
        mean, std = mean.reshape(()), std.reshape(())
    # A copy even of float32: the batch may share memory with the dataset.
    values = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return values.mul_(constants.scale).sub_(mean).div_(std)


def _rows(array: Array, rows: NDArray[np.int64] | slice) -> Tensor:
    # np.array copies: a read-only mapping must not become a tensor that can be written to.
    picked = np.array(array[rows]) if isinstance(rows, slice) else np.take(array, rows, axis=0)
    return torch.from_numpy(np.asarray(picked))
