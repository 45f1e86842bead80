"""Open an engine file: which library it is for, by its record or by trying."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Mapping, Sequence

from edgerun.engine_loading import load_engine
from edgerun.engine_model import EngineModel
from edgerun.errors import BadInput, EdgerunError, NoDevice
from edgerun.model import check_file
from edgerun.tensorrt_check import check_engine
from edgerun.tensorrt_library import MODULES, installation, open_library


def open_engine(path: Path) -> EngineModel:
    """Open an engine with the library that built it.

    Its record says which; an engine without one is tried with each library that is installed.

    Raises:
        BadInput: there is no such file, it is truncated, it was built by or for something else,
            or its library is absent.
        NoDevice: there is no driver or GPU.
        RunFailed: the library or the device's memory fails.
    """
    check_file(path)
    record = check_engine(path)
    if record is not None:
        library = open_library(str(record["library"]))
        loaded = load_engine(path, library, bool(record["settings"]["version_compatible"]))
        return EngineModel(path, loaded, _dimension_names(record))
    installed = [name for name, module in MODULES.items() if find_spec(module) is not None]
    if not installed:
        raise BadInput(
            "no TensorRT is installed",
            where=str(path),
            remedy="; or ".join(f"{name}: {installation(name)}" for name in MODULES),
        )
    refusals: list[EdgerunError] = []
    for name in installed:
        try:
            return EngineModel(path, load_engine(path, open_library(name)))
        except EdgerunError as error:
            refusals.append(error)
    raise refusals[0] if len(refusals) == 1 else _refused(path, installed, refusals)


def _refused(
    path: Path, libraries: Sequence[str], refusals: Sequence[EdgerunError]
) -> EdgerunError:
    told = "; ".join(f"{name}: {error.what}" for name, error in zip(libraries, refusals))
    # A library that misses only the GPU has not found the file wrong.
    kind = NoDevice if any(isinstance(error, NoDevice) for error in refusals) else BadInput
    return kind(f"no library here takes the engine: {told}", str(path), remedy=refusals[-1].remedy)


def _dimension_names(record: Mapping[str, Any]) -> dict[str, Sequence[int | str | None]]:
    tensors = [*record.get("inputs", ()), *record.get("outputs", ())]
    return {tensor["name"]: tensor["shape"] for tensor in tensors}
