"""Build a TensorRT engine, with a timing cache and a record next to it.

The file names the library, its version and the GPU: timings of another one would choose kernels
that are slow here. TensorRT for RTX chooses kernels on the device and does not use it.

The same code runs on the workstation (tensorrt-rtx needs no GPU to build) and on a Jetson, whose
engines can be built nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

import edgerun
from edgerun.errors import BadInput, RunFailed
from edgerun.files import check_output, describe_files, remove, sha256, write_whole
from edgerun.tensorrt.config import (
    Layers,
    check_keep,
    check_precision,
    check_settings,
    configure,
    is_weakly_typed,
    network_layers,
)
from edgerun.tensorrt.inspect import Inspection, engine_layers, inspect_engine
from edgerun.tensorrt.library import Library, find_gpu, open_library
from edgerun.tensorrt.network import read_network, refusal
from edgerun.tensorrt.settings import (
    BuildSettings,
    choose_ranges,
    named_dimensions,
    network_inputs,
    ranges_to_json,
)

MAGIC = b"edgerun.timing-cache/1 "


@dataclass
class TimingCache:
    """A cache attached to a builder's configuration.

    Attributes:
        path: its file.
        key: library, version and device of its timings.
        state: ``new``, ``reused`` or ``replaced``.
        reason: why an earlier one was replaced.
        bytes_before: size of the reused timings.
    """

    path: Path
    key: Dict[str, str]
    state: str = "new"
    reason: str | None = None
    bytes_before: int = 0

    @classmethod
    def attach(cls, library: Library, config: Any, path: Path, device: str) -> TimingCache:
        """Load a cache's file, if it is of this library and device, into the configuration.

        Raises:
            BadInput: the file is no timing cache, and saving would overwrite it.
        """
        cache = cls(path, {"library": library.name, "version": library.version, "device": device})
        timings = cache._read()
        if timings and not config.set_timing_cache(config.create_timing_cache(timings), False):
            cache._replace(f"{library} refuses it")
            timings = b""
        if not timings:
            config.set_timing_cache(config.create_timing_cache(b""), False)
        cache.bytes_before = len(timings)
        return cache

    def save(self, config: Any) -> Dict[str, Any]:
        """Write the current timings, and describe the cache for the record.

        Raises:
            CannotWrite: the file cannot be written.
        """
        timings = bytes(memoryview(config.get_timing_cache().serialize()))
        header = {**self.key, "sha256": _digest(timings), "bytes": len(timings)}
        content = MAGIC + json.dumps(header).encode("utf-8") + b"\n" + timings
        write_whole(self.path, content)
        return {
            "file": str(self.path),
            "state": self.state,
            "reason": self.reason,
            "bytes_before": self.bytes_before,
            "bytes": len(timings),
        }

    def _read(self) -> bytes:
        if not self.path.exists():
            return b""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise BadInput(f"the timing cache cannot be read: {error}", str(self.path)) from error
        if not content.startswith(MAGIC) and content:
            raise BadInput(
                "this file is not a timing cache of edgerun, and would be overwritten",
                where=str(self.path),
                remedy="give --timing-cache another file",
            )
        head, _, timings = content[len(MAGIC) :].partition(b"\n")
        try:
            header = json.loads(head.decode("utf-8"))
            key = {name: str(header[name]) for name in self.key}
            whole = header["sha256"] == _digest(timings)
        except (ValueError, KeyError, TypeError):
            return self._replace("it is damaged")
        if not whole:
            return self._replace("it is damaged")
        if key != self.key:
            differences = [
                f"{key[n]}, not {self.key[n]}" for n in self.key if key[n] != self.key[n]
            ]
            return self._replace(f"its timings are of {'; '.join(differences)}")
        self.state = "reused"
        return timings

    def _replace(self, reason: str) -> bytes:
        self.state, self.reason = "replaced", reason
        return b""


def _digest(timings: bytes) -> str:
    return hashlib.sha256(timings).hexdigest()


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
    """Build an engine; ``engine`` exists afterwards only if it meets the settings.

    Next to it, ``<engine>.json`` is the record, and ``<engine>.layers.json`` the inspector's
    layers, where the engine could be loaded.

    Returns:
        A record ``edgerun.build/1``.

    Raises:
        BadInput: the library is absent, the model or a setting is wrong, the parser refuses the
            model, its layers do not have the requested precision, or no file can be written
            at ``engine``.
        RunFailed: the library does not start, build or load, or chose another precision.
        CannotWrite: the engine or a file next to it cannot be written.
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
    """The path of an engine's record."""
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
    # A weakly typed network has the model's types, not the builder's choice.
    certain = not weak or inspection.layers is not None
    return {**layers.to_json(), "certain": certain}


def _save_inspection(engine: Path, inspection: Inspection) -> Dict[str, Any]:
    path = _beside(engine, LAYERS_SUFFIX)
    if inspection.layers is None:
        remove(path)  # one of an earlier build would be mistaken for this engine's
        return {"inspected": False, "reason": inspection.reason}
    write_whole(path, (json.dumps(inspection.to_json()) + "\n").encode("utf-8"))
    return {"inspected": True, "memory_bytes": inspection.memory_bytes, "layers_file": path.name}


def _build_failed(library: Library, model: Path) -> RunFailed:
    reason = library.log.last_error() or "it gives no reason"
    remedy = next((text for word, text in _REMEDIES if word in reason), None)
    return RunFailed(f"{library} built no engine: {reason}", where=str(model), remedy=remedy)
