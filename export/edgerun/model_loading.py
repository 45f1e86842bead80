"""Open a model by its suffix, and describe its inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Mapping

from edgerun.errors import NoDevice
from edgerun.files import describe_files, is_engine
from edgerun.model import LoadedModel, Settings, TensorInfo


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
        BadInput: as :func:`edgerun.model_loading.open_model`.
        NoDevice: there is no GPU, and no record next to the engine either.
        RunFailed: the runtime cannot load it.
    """
    record = None
    if is_engine(path):
        from edgerun.tensorrt.check import read_record

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
