"""The builder: from an ONNX file to an engine file, with a record of what it is beside it.

The same code runs on the workstation (tensorrt-rtx needs no GPU to build) and on a Jetson, whose
engines can be built nowhere else.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Dict

import edgerun
from edgerun.errors import RunFailed
from edgerun.model_files import describe_files, sha256
from edgerun.output_file import check_output, remove, write_whole
from edgerun.tensorrt_cache import TimingCache
from edgerun.tensorrt_config import check_settings, configure, is_weakly_typed
from edgerun.tensorrt_device import find_gpu
from edgerun.tensorrt_inspect import Inspection, engine_layers, inspect_engine
from edgerun.tensorrt_library import Library, open_library
from edgerun.tensorrt_network import read_network, refusal
from edgerun.tensorrt_precision import Layers, check_keep, check_precision, network_layers
from edgerun.tensorrt_settings import BuildSettings, ranges_to_json
from edgerun.tensorrt_shapes import choose_ranges, named_dimensions, network_inputs

BUILD_SCHEMA = "edgerun.build/1"
RECORD_SUFFIX = ".json"
LAYERS_SUFFIX = ".layers.json"
_REMEDIES = (
    (
        "libnvinfer_lean",
        "this installation cannot build version-compatible engines: leave --version-compatible out",
    ),
    ("workspace", "give more scratch memory: --workspace-mb"),
    ("DLA", "allow the GPU to run what the DLA cannot (without --no-gpu-fallback)"),
    ("Cannot compile operation", "leave that compute capability out, or convert the model to fp16"),
)


def build(model: Path, engine: Path, name: str, settings: BuildSettings) -> Dict[str, Any]:
    """Build an engine; nothing is left at ``engine`` unless it is what was asked for.

    Beside it ``<engine>.json`` holds the record, and ``<engine>.layers.json`` what the inspector
    saw, where the engine could be loaded.

    Returns:
        A record ``edgerun.build/1``.

    Raises:
        BadInput: the library is absent, the model or a setting is wrong, the parser refuses the
            model, its layers do not have the precision that was asked for, or no file can stand
            at ``engine``.
        RunFailed: the library starts, builds or loads nothing, or gave layers another precision.
        CannotWrite: the engine or what lies beside it cannot be written.
    """
    for path in (engine, record_path(engine), _beside(engine, LAYERS_SUFFIX)):
        check_output(path, "--engine")
    if settings.timing_cache is not None:
        check_output(settings.timing_cache, "--timing-cache")
    library = open_library(name)
    check_settings(library, settings)
    weak = is_weakly_typed(library, settings)
    parsed = read_network(library, model, strongly_typed=not weak)
    if parsed.problems:
        raise refusal(library, model, parsed.problems)
    ranges = choose_ranges(network_inputs(parsed.network), settings.shapes, settings.batch)
    layers = network_layers(parsed.network)
    check_keep(layers, settings.keep)
    if not weak or settings.precision == "int8":
        check_precision(layers, settings.precision, settings.keep, str(model))
    config = configure(library, parsed, settings, ranges)
    gpu = find_gpu()
    cache = _timing_cache(library, config, settings, None if gpu is None else gpu.name)
    begin = time.perf_counter()
    serialized = parsed.builder.build_serialized_network(parsed.network, config)
    seconds = time.perf_counter() - begin
    if serialized is None:
        raise _build_failed(library, model)
    content = bytes(memoryview(serialized))
    warnings = list(library.log.warnings)
    timing = cache.save(config) if cache is not None else _no_cache(library, settings)
    inspection = inspect_engine(library, content, settings.version_compatible)
    if inspection.layers is not None:
        seen = engine_layers(inspection.layers, layers.matrix_names)
        if weak:
            check_precision(seen, settings.precision, settings.keep, str(model))
            layers = seen
    write_whole(engine, content)
    record = {
        "schema": BUILD_SCHEMA,
        "edgerun": edgerun.__version__,
        "library": library.name,
        "version": library.version,
        "device": None if gpu is None else gpu.to_json(),
        "model": {"path": str(model), **describe_files(model)},
        "engine": {"path": str(engine), "sha256": sha256(engine), "bytes": len(content)},
        "seconds": seconds,
        "settings": settings.to_json(),
        **named_dimensions(parsed.network),
        "profile": ranges_to_json(ranges),
        "compute_capabilities": list(settings.compute_capabilities),
        "timing_cache": timing,
        "layers": _describe_layers(layers, weak, inspection),
        **_save_inspection(engine, inspection),
        "warnings": warnings,
    }
    write_whole(_beside(engine, RECORD_SUFFIX), (json.dumps(record) + "\n").encode("utf-8"))
    return record


def record_path(engine: Path) -> Path:
    """Where the record of an engine lies."""
    return _beside(engine, RECORD_SUFFIX)


def _beside(engine: Path, suffix: str) -> Path:
    return engine.with_name(engine.name + suffix)


def _timing_cache(
    library: Library, config: Any, settings: BuildSettings, device: str | None
) -> TimingCache | None:
    if settings.timing_cache is None or library.name == "tensorrt-rtx":
        return None
    return TimingCache.attach(library, config, settings.timing_cache, device or "no GPU")


def _no_cache(library: Library, settings: BuildSettings) -> Dict[str, Any] | None:
    if settings.timing_cache is None:
        return None
    return {
        "file": None,
        "state": "unused",
        "reason": f"{library} times no kernels when it builds, and ignores timing caches",
    }


def _describe_layers(layers: Layers, weak: bool, inspection: Inspection) -> Dict[str, Any]:
    # A weakly typed network says what the model has, not what the builder chose.
    certain = not weak or inspection.layers is not None
    return {**layers.to_json(), "certain": certain}


def _save_inspection(engine: Path, inspection: Inspection) -> Dict[str, Any]:
    path = _beside(engine, LAYERS_SUFFIX)
    if inspection.layers is None:
        remove(path)  # one that an earlier build left would be taken for this engine's
        return {"inspected": False, "reason": inspection.reason}
    write_whole(path, (json.dumps(inspection.to_json()) + "\n").encode("utf-8"))
    return {"inspected": True, "memory_bytes": inspection.memory_bytes, "layers_file": path.name}


def _build_failed(library: Library, model: Path) -> RunFailed:
    reason = library.log.last_error() or "it gives no reason"
    remedy = next((text for word, text in _REMEDIES if word in reason), None)
    return RunFailed(f"{library} built no engine: {reason}", where=str(model), remedy=remedy)
