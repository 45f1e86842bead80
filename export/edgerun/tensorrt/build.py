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
from typing import Any, Collection, Dict, Iterator, List, Mapping, Sequence

import edgerun
from edgerun.errors import BadInput, RunFailed
from edgerun.files import check_output, describe_files, remove, sha256, write_whole
from edgerun.tensorrt.engine import BUILD_SCHEMA, Inspection, inspect_engine, record_path
from edgerun.tensorrt.layers import (
    FLOATS,
    MATRIX_LAYERS,
    Layers,
    check_keep,
    check_precision,
    engine_layers,
    network_layers,
    onnx_name,
)
from edgerun.tensorrt.library import Library, find_gpu, open_library
from edgerun.tensorrt.network import Parsed, read_network, refusal
from edgerun.tensorrt.settings import (
    BuildSettings,
    Range,
    check_settings,
    choose_ranges,
    is_weakly_typed,
    named_dimensions,
    network_inputs,
    ranges_to_json,
)

MAGIC = b"edgerun.timing-cache/1 "


_DATA_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


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


def build(model: Path, engine: Path, settings: BuildSettings) -> Dict[str, Any]:
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
    library = open_library(settings.library)
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
    write_whole(record_path(engine), (json.dumps(record) + "\n").encode("utf-8"))
    return record


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


def build_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines about a built engine: its target and the precision of its layers."""
    engine, layers = record["engine"], record["layers"]
    yield (
        f"{engine['path']}  {engine['bytes'] / 1e6:.3f} MB  "
        f"{record['library']} {record['version']}  {record['seconds']:.2f} s"
    )
    if record["compute_capabilities"]:
        yield f"  for SM {', '.join(record['compute_capabilities'])}"
    for name, sizes in record["profile"].items():
        shapes = ["x".join(map(str, sizes[key])) for key in ("min", "usual", "max")]
        yield f"  input {name} {' : '.join(shapes)}"
    counts = ", ".join(f"{n} {precision}" for precision, n in layers["by_precision"].items())
    sure = "" if layers["certain"] else " (of the model; the builder may have chosen others)"
    yield f"  layers: {counts or 'none'}{sure}"
    if not record["inspected"]:
        yield f"  the engine was not loaded here: {record['reason']}"
    cache = record["timing_cache"]
    if cache is not None:
        why = f": {cache['reason']}" if cache["reason"] else ""
        yield f"  timing cache {cache['state']}{why}"
    for warning in record["warnings"]:
        yield f"  {record['library']} warns: {warning}"


def configure(
    library: Library, parsed: Parsed, settings: BuildSettings, ranges: Mapping[str, Range]
) -> Any:
    """The builder configuration.

    Raises:
        BadInput: the library, the machine or the network does not support a setting.
    """
    module = library.module
    config = parsed.builder.create_builder_config()
    # The inspector reports types only for engines built with detailed verbosity.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if settings.workspace_mb is not None:
        limit = int(settings.workspace_mb * 1e6)
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, limit)
    if settings.version_compatible:
        _set_flag(library, config, "VERSION_COMPATIBLE", "--version-compatible")
    if settings.hardware_compatible:
        level = library.member("HardwareCompatibilityLevel", "AMPERE_PLUS")
        if level is None:
            raise _missing(library, "hardware compatibility levels", "--hardware-compatible")
        config.hardware_compatibility_level = level
    if settings.dla is not None:
        _use_dla(library, parsed.builder, config, settings)
    if settings.compute_capabilities:
        known = library.compute_capabilities()
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, capability in enumerate(settings.compute_capabilities):
            config.set_compute_capability(known[capability], index)
    if settings.precision is not None and is_weakly_typed(library, settings):
        _ask_precision(library, parsed.network, config, settings)
    if ranges:
        _add_profile(parsed.builder, config, ranges)
    return config


def _use_dla(library: Library, builder: Any, config: Any, settings: BuildSettings) -> None:
    cores = int(getattr(builder, "num_DLA_cores", 0))
    if settings.dla is None or settings.dla >= cores:
        raise BadInput(
            f"{library} finds {cores or 'no'} DLA core{'' if cores == 1 else 's'} here; "
            f"core {settings.dla} was asked for",
            where="--dla",
            remedy="build on a Jetson that has a DLA, or leave --dla out",
        )
    config.default_device_type = library.module.DeviceType.DLA
    config.DLA_core = settings.dla
    if settings.gpu_fallback:
        _set_flag(library, config, "GPU_FALLBACK", "--dla")


def _ask_precision(library: Library, network: Any, config: Any, settings: BuildSettings) -> None:
    """Flags of a weakly typed network, and the type of each layer that requires one."""
    precision = str(settings.precision)
    flags: List[str] = [precision.upper()]
    if settings.dla is not None and precision == "int8":
        # Layers without INT8 support on the DLA compute in FP16.
        flags.append("FP16")
    for flag in flags:
        _set_flag(library, config, flag, "--precision")
    if precision == "int8":
        # Quantize and dequantize nodes state the precision; a second statement would be refused.
        return
    obey = library.member("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS")
    if obey is None:
        raise _missing(library, "precision constraints", "--precision")
    config.set_flag(obey)
    _constrain(library, network, precision, settings.keep)


def _constrain(library: Library, network: Any, precision: str, keep: Collection[str]) -> None:
    types: Dict[str, Any] = {
        name: library.member("DataType", kind) for name, kind in _DATA_TYPES.items()
    }
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name not in MATRIX_LAYERS or layer.get_output(0).dtype.name not in FLOATS:
            continue
        layer.precision = types["fp32" if onnx_name(layer) in keep else precision]


def _add_profile(builder: Any, config: Any, ranges: Mapping[str, Range]) -> None:
    profile = builder.create_optimization_profile()
    for name, sizes in ranges.items():
        profile.set_shape(name, sizes.min, sizes.opt, sizes.max)
    if config.add_optimization_profile(profile) < 0:
        raise BadInput(
            f"the library refuses the shapes of {_listed(list(ranges))}",
            where="--shape",
            remedy="give shapes that fit each other",
        )


def _set_flag(library: Library, config: Any, name: str, option: str) -> None:
    flag = library.member("BuilderFlag", name)
    if flag is None:
        raise _missing(library, name, option)
    config.set_flag(flag)


def _missing(library: Library, what: str, option: str) -> BadInput:
    return BadInput(f"{library} has no {what}", option, f"leave {option} out")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
