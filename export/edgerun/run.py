"""Outputs for every sample of an npz file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgerun.errors import BadInput, RunFailed
from edgerun.files import write_errors
from edgerun.inputs import Samples, load_arrays
from edgerun.manifest import Manifest
from edgerun.model import LoadedModel
from edgerun.npz import write_npz

BATCH = 64
"""Batch size, for a model of open batch size."""


@dataclass(frozen=True)
class Answers:
    """Outputs by name, samples first, and the class names where the manifest has them."""

    outputs: dict[str, np.ndarray[Any, Any]]
    samples: int
    labels: np.ndarray[Any, Any] | None

    def save(self, path: Path) -> None:
        """Write an npz file: the outputs, and ``label`` (text) when there are labels.

        Raises:
            RunFailed: the file cannot be written.
        """
        arrays: dict[str, Any] = dict(self.outputs)
        if self.labels is not None:
            arrays.setdefault("label", self.labels)
        with write_errors(path, "the output", error=RunFailed), path.open("wb") as file:
            write_npz(file, arrays)


def run(
    model: LoadedModel,
    inputs: Path,
    batch: int | None = None,
    manifest: Manifest | None = None,
    raw: bool = False,
) -> Answers:
    """Run every sample, in batches.

    For a model of fixed or minimum batch size the last batch is padded with copies of the last
    sample, whose outputs are dropped. ``raw`` applies the manifest's preprocessing to data of
    any dtype, not only to uint8.

    Raises:
        BadInput: the file does not fit the model's inputs.
        RunFailed: the runtime fails, or outputs change their shape from batch to batch.
    """
    if raw and (manifest is None or not manifest.preprocess):
        raise BadInput(
            "raw inputs need a manifest with preprocessing constants",
            where="--raw",
            remedy="give --bundle FOLDER or --manifest manifest.json",
        )
    arrays = load_arrays(inputs, model.inputs, manifest, raw)
    samples = Samples.of(arrays, model.inputs, str(inputs))
    least, most = model.batch_range or (1, BATCH)
    size = samples.layout.batch(batch, default=max(least, min(BATCH, most, samples.count)))
    gathered: dict[str, np.ndarray[Any, Any]] = {}
    for start in range(0, samples.count, size):
        wanted = min(size, samples.count - start)
        # Only a fixed batch must be padded; an open one takes the rest unpadded.
        fed = size if samples.layout.size is not None else max(wanted, least)
        for tensor, answer in zip(model.outputs, model.run(samples.feed(start, fed))):
            axis = samples.layout.axis_of(tensor)
            part = _by_sample(tensor.name, np.asarray(answer), axis, fed)[:wanted]
            if tensor.name not in gathered:
                shape = (samples.count, *part.shape[1:])
                gathered[tensor.name] = np.empty(shape, part.dtype)
            if part.shape[1:] != gathered[tensor.name].shape[1:]:
                raise RunFailed(
                    f"output {tensor.name!r} changes its shape from {part.shape[1:]} to "
                    f"{gathered[tensor.name].shape[1:]} between batches",
                    where=f"samples {start} to {start + wanted - 1}",
                    remedy="outputs of different shapes do not fit one array: run these samples "
                    "from files of their own",
                )
            gathered[tensor.name][start : start + wanted] = part
    labels = manifest.labels if manifest else None
    return Answers(gathered, samples.count, _named(gathered, labels))


def _by_sample(
    name: str, answer: np.ndarray[Any, Any], axis: int, batch: int
) -> np.ndarray[Any, Any]:
    """The output with samples on its first axis, wherever the model has them."""
    if axis < answer.ndim and answer.shape[axis] == batch:
        return np.moveaxis(answer, axis, 0)
    if batch == 1:
        return answer[np.newaxis]
    raise RunFailed(
        f"output {name!r} of shape {answer.shape} has no value per sample for {batch} samples",
        remedy="run one sample at a time: --batch 1",
    )


def _named(
    outputs: dict[str, np.ndarray[Any, Any]], labels: tuple[str, ...] | None
) -> np.ndarray[Any, Any] | None:
    """The class name of the largest value of the first output with one value per class."""
    if labels is None:
        return None
    for scores in outputs.values():
        if scores.ndim == 2 and scores.shape[1] == len(labels):
            named: np.ndarray[Any, Any] = np.asarray(labels)[scores.argmax(axis=1)]
            return named
    return None
