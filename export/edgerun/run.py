"""Open a model, describe it, and run it: once, as a probe, or on every sample of an npz file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import numpy as np

from edgerun.errors import BadInput, EdgerunError, NoDevice, RunFailed
from edgerun.files import describe_files, is_engine, write_errors
from edgerun.inputs import SampleArrays, feeds_from, load_arrays, make_feeds
from edgerun.manifest import Manifest, manifest_beside
from edgerun.model import LoadedModel, Settings, TensorInfo
from edgerun.npz import write_npz

PROBE_SCHEMA = "edgerun.probe/1"
OPENS, RUNS = "opens", "runs"
BATCH = 64
"""Batch size of :func:`run`, for a model of open batch size."""


def open_model(path: Path, settings: Settings) -> LoadedModel:
    """Open an ONNX file with ONNX Runtime, or a TensorRT engine with its library.

    Raises:
        BadInput: the file is missing or truncated, or an engine was built for something else.
        NoDevice: there is no GPU for an engine.
        RunFailed: the runtime cannot load it.
    """
    if is_engine(path):
        from edgerun.tensorrt.runner import open_engine

        return open_engine(path)
    from edgerun.onnx_session import OrtSession

    return OrtSession(path, settings)


def describe_model(path: Path) -> dict[str, Any]:
    """``path``, ``sha256``, ``size_bytes``, ``files``, ``inputs`` and ``outputs``.

    An engine with its record also has ``library``, ``version``, ``compute_capabilities`` and
    ``not_opened``: the reason why it cannot be opened here, or None. Where it cannot, its inputs
    and outputs are the record's, without a ``dtype``.

    Raises:
        BadInput: as :func:`open_model`.
        NoDevice: there is no GPU, and no record next to the engine either.
        RunFailed: the runtime cannot load it.
    """
    record = None
    if is_engine(path):
        from edgerun.tensorrt.engine import read_record

        record = read_record(path)
    reason = None
    try:
        model = open_model(path, Settings())
        tensors: dict[str, Any] = {
            "inputs": [tensor.to_json() for tensor in model.inputs],
            "outputs": [tensor.to_json() for tensor in model.outputs],
        }
    except NoDevice as error:
        if record is None:
            raise
        reason = error.what
        tensors = {kind: record.get(kind, []) for kind in ("inputs", "outputs")}
    built = {}
    if record is not None:
        built = {key: record[key] for key in ("library", "version", "compute_capabilities")}
        built["not_opened"] = reason
    return {"path": str(path), **describe_files(path), **built, **tensors}


def model_lines(model: Mapping[str, Any]) -> Iterator[str]:
    """A description as plain text for a terminal."""
    if "library" in model:
        sm = ", ".join(model["compute_capabilities"])
        yield f"engine of {model['library']} {model['version']}" + (f" for SM {sm}" if sm else "")
        if model["not_opened"]:
            yield f"  by its record; {model['not_opened']}"
    for kind in ("input", "output"):
        for tensor in model[f"{kind}s"]:
            shape = tuple(tensor["shape"])
            yield f"{kind:6} {TensorInfo(tensor['name'], tensor.get('dtype', ''), shape)}"


def probe(
    path: Path,
    settings: Settings,
    inputs: Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    batch: int | None = None,
    run: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Open a model and run it once, in a process that a runtime may crash.

    Each step is reported beforehand, so that the parent process knows which one ended it.

    Args:
        inputs: an npz file, its first sample is run; None: random inputs.
        run: whether to run it.
        report: called with ``opens`` and ``runs`` before each step.

    Returns:
        A record ``edgerun.probe/1``. ``ran`` is False where the model was only opened, and
        ``reason`` then says what prevented running: random inputs may be invalid for it.

    Raises:
        BadInput: the file is no model.
        RunFailed: the runtime cannot load it, or does not run it on ``inputs``.
    """
    report(OPENS)
    model = open_model(path, settings)
    record: dict[str, Any] = {"schema": PROBE_SCHEMA, "ran": False, "reason": None}
    if not run:
        return record
    try:
        if inputs is None:
            feeds = make_feeds(model.inputs, shapes or {}, batch)
        else:
            feeds = feeds_from(inputs, model.inputs, batch, manifest_beside(model.path))
        report(RUNS)
        model.run(feeds.feeds[0])
    except EdgerunError as error:
        if inputs is not None:
            raise
        return {**record, "reason": error.what}
    return {**record, "ran": True}


@dataclass(frozen=True)
class Outputs:
    """Outputs by name, samples first, and the class names where the manifest has them."""

    arrays: dict[str, np.ndarray[Any, Any]]
    samples: int
    labels: np.ndarray[Any, Any] | None

    def save(self, path: Path) -> None:
        """Write an npz file: the outputs, and ``label`` (text) when there are labels.

        Raises:
            RunFailed: the file cannot be written.
        """
        arrays: dict[str, Any] = dict(self.arrays)
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
) -> Outputs:
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
    samples = SampleArrays.of(arrays, model.inputs, str(inputs))
    least, most = model.batch_range or (1, BATCH)
    size = samples.layout.batch(batch, default=max(least, min(BATCH, most, samples.count)))
    gathered: dict[str, np.ndarray[Any, Any]] = {}
    for start in range(0, samples.count, size):
        wanted = min(size, samples.count - start)
        # Only a fixed batch must be padded; an open one takes the rest unpadded.
        fed = size if samples.layout.size is not None else max(wanted, least)
        for tensor, output in zip(model.outputs, model.run(samples.feed(start, fed))):
            axis = samples.layout.axis_of(tensor)
            part = _by_sample(tensor.name, np.asarray(output), axis, fed)[:wanted]
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
    return Outputs(gathered, samples.count, _named(gathered, labels))


def _by_sample(
    name: str, output: np.ndarray[Any, Any], axis: int, batch: int
) -> np.ndarray[Any, Any]:
    """The output with samples on its first axis, wherever the model has them."""
    if axis < output.ndim and output.shape[axis] == batch:
        return np.moveaxis(output, axis, 0)
    if batch == 1:
        return output[np.newaxis]
    raise RunFailed(
        f"output {name!r} of shape {output.shape} has no value per sample for {batch} samples",
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
