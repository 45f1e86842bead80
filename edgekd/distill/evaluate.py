"""Run batches through a model: batch sources, device and layout, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.errors import InputError
from edgekd.tasks import Task


class BatchSource(Protocol):
    """A source of batches: mappings from name to tensor, inputs and targets together."""

    def epoch(self, seed: int, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """The batches of an epoch, shuffled and augmented by (seed, epoch)."""
        ...

    def ordered(self) -> Iterator[Mapping[str, Tensor]]:
        """Every sample once, in order and without augmentation."""
        ...

    def __len__(self) -> int:
        """Number of batches per epoch."""
        ...

    @property
    def samples(self) -> int:
        """Number of rows of the split."""
        ...


class Loaders(NamedTuple):
    """The two sources of a training; the test split is not one of them."""

    train: BatchSource
    validation: BatchSource


def score(
    answer: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], source: BatchSource, task: Task
) -> np.ndarray[Any, Any]:
    """The task's score of each labelled sample, (N,) float64, in the source's order.

    Args:
        answer: returns the outputs by name: a teacher's ``answer``, or a model in evaluation mode.
        source: every sample of it that has a target is scored.
        task: defines the score.

    Raises:
        InputError: there is nothing to score.
        StageError: an output is NaN or infinite.
    """
    scores = []
    with torch.inference_mode():
        for batch in source.ordered():
            outputs = {name: _array(tensor) for name, tensor in answer(batch).items()}
            targets = {name: tensor.cpu().numpy() for name, tensor in batch.items()}
            scores.append(task.scores(outputs, targets)[task.labelled(targets)])
    found: np.ndarray[Any, Any] = np.concatenate(scores) if scores else np.empty(0)
    if len(found) == 0:
        raise InputError(
            f"there are no {'labelled ' if scores else ''}samples to score",
            remedy="give labels, or a teacher whose predictions replace them"
            if scores
            else "give more data",
        )
    return found


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    # numpy has no bfloat16.
    wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    array: np.ndarray[Any, Any] = wide.cpu().numpy()
    return array


def prepared(
    batch: Mapping[str, Tensor], device: torch.device, channels_last: bool
) -> dict[str, Tensor]:
    """A batch on the model's device, its images in the model's layout."""
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    if not channels_last:
        return moved
    return {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in moved.items()
    }


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
