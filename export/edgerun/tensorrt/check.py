"""Check that an engine file fits this machine, before a runtime raises an opaque error.

Everything but the GPU is checked against the builder's record next to the engine, so that
a truncated file or another version is named on a machine without a GPU too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

from edgerun.errors import BadInput
from edgerun.files import sha256
from edgerun.tensorrt.build import BUILD_SCHEMA, record_path
from edgerun.tensorrt.library import Gpu, Library, find_gpu, open_library

AMPERE = (8, 0)


def check_engine(path: Path) -> Dict[str, Any] | None:
    """Check an engine file against its record, the installed library, and the GPU.

    Returns:
        The record ``edgerun.build/1``; None for an engine without one, made by another program.

    Raises:
        BadInput: there is no such engine; it is truncated or changed; its library is absent; or it
            was built by another version or for another GPU, with both named.
        RunFailed: the library is installed and cannot be loaded.
    """
    record = read_record(path)
    if record is None:
        return None
    _check_bytes(path, record)
    library = open_library(str(record["library"]))
    _check_version(path, record, library)
    gpu = find_gpu()
    if gpu is not None:
        _check_gpu(path, record, gpu)
    return record


def read_record(path: Path) -> Dict[str, Any] | None:
    """The record next to an engine, or None without one.

    Raises:
        BadInput: there is no such engine, or the record is not one.
    """
    if not path.is_file():
        what = "the engine is a folder, not a file" if path.exists() else "there is no such engine"
        raise BadInput(what, str(path), "build it: python -m edgerun build MODEL.onnx --engine OUT")
    beside = record_path(path)
    if not beside.is_file():
        return None
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_record(beside) from error
    if not isinstance(record, dict) or record.get("schema") != BUILD_SCHEMA:
        raise _bad_record(beside)
    return record


def _bad_record(beside: Path) -> BadInput:
    return BadInput(
        "this is not the record of an engine's build",
        where=str(beside),
        remedy="copy it again with its engine, or build the engine again",
    )


def _check_bytes(path: Path, record: Dict[str, Any]) -> None:
    here, then = path.stat().st_size, int(record["engine"]["bytes"])
    if here < then:
        raise BadInput(
            f"the engine is truncated: {here} bytes, its record says {then}",
            where=str(path),
            remedy="copy it again, or build it again",
        )
    if here > then or sha256(path) != record["engine"]["sha256"]:
        raise BadInput(
            "the engine is not the one that its record describes",
            where=str(path),
            remedy="copy both again, or build it again",
        )


def _check_version(path: Path, record: Dict[str, Any], library: Library) -> None:
    then, here = _numbers(str(record["version"])), _numbers(library.version)
    compatible = bool(record["settings"]["version_compatible"]) and here >= then
    if here != then and not compatible:
        raise BadInput(
            f"{_built(record)}, and here is {library}",
            where=str(path),
            remedy=f"build it again here, or install {record['library']} {record['version']}",
        )


def _check_gpu(path: Path, record: Dict[str, Any], gpu: Gpu) -> None:
    meant: List[str] = list(record["compute_capabilities"])
    device = record["device"]
    if not meant and record["library"] == "tensorrt" and device is not None:
        meant = [device["compute_capability"]]
    above = record["settings"]["hardware_compatible"] and _numbers(gpu.compute_capability) >= AMPERE
    if meant and gpu.compute_capability not in meant and not above:
        raise BadInput(
            f"{_built(record)}, and here is {gpu}",
            where=str(path),
            remedy="build it again here, or with --sm "
            f"{gpu.compute_capability} where tensorrt-rtx has it",
        )


def _built(record: Dict[str, Any]) -> str:
    """The library and the device that an engine was built by and for."""
    sm = ", ".join(record["compute_capabilities"])
    device = record["device"]
    for_device = f" for SM {sm}" if sm else ""
    if not sm and device is not None:
        for_device = f" for {device['name']} (SM {device['compute_capability']})"
    return f"the engine was built by {record['library']} {record['version']}{for_device}"


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: engines are not compatible with other patch
    releases.
    """
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
