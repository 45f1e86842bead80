"""The builder's configuration: settings turned into flags, limits, devices and profiles."""

from __future__ import annotations

from typing import Any, Collection, Dict, List, Mapping, Sequence

from edgerun.errors import BadInput
from edgerun.tensorrt_library import Library
from edgerun.tensorrt_network import Parsed
from edgerun.tensorrt_precision import FLOATS, MATRIX_LAYERS, onnx_name
from edgerun.tensorrt_settings import BuildSettings, Range

_DATA_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


def is_weakly_typed(library: Library, settings: BuildSettings) -> bool:
    """Whether the precision is asked of the builder.

    Only TensorRT before 11 can be asked, and only what is not float32; everywhere else the types
    are the model's.
    """
    return library.weakly_typed and settings.precision not in (None, "fp32")


def check_settings(library: Library, settings: BuildSettings) -> None:
    """Raise BadInput for what this library cannot do, before the model is read."""
    known = library.compute_capabilities()
    if settings.compute_capabilities and not known:
        raise BadInput(
            f"{library} builds for the GPU it runs on alone",
            where="--sm",
            remedy="leave --sm out and build on the device, or use --library tensorrt-rtx",
        )
    for capability in settings.compute_capabilities:
        if capability not in known:
            raise BadInput(
                f"{library} has no compute capability {capability}",
                where="--sm",
                remedy=f"it has {', '.join(known)}; an engine for a Jetson is built on the Jetson, "
                "with 'python -m edgerun build MODEL.onnx --engine OUT --library tensorrt'",
            )
    if settings.hardware_compatible and known:
        # Tried with 1.7.1: the level is taken, and the engine is the same to the last byte.
        raise BadInput(
            f"{library} has no use for hardware compatibility",
            where="--hardware-compatible",
            remedy="name each GPU that the engine is for: --sm 8.6 --sm 8.9",
        )
    if settings.dla is not None and settings.precision not in ("fp16", "int8"):
        raise BadInput(
            "a DLA computes in FP16 and INT8 alone",
            where="--dla",
            remedy="add --precision fp16 or --precision int8",
        )


def configure(
    library: Library, parsed: Parsed, settings: BuildSettings, ranges: Mapping[str, Range]
) -> Any:
    """The configuration to build with.

    Raises:
        BadInput: the library, the machine or the network cannot do what is set.
    """
    module = library.module
    config = parsed.builder.create_builder_config()
    # The inspector tells types only of engines that were built to tell them.
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
    """Flags of a weakly typed network, and the type of each layer that must have it."""
    asked = str(settings.precision)
    flags: List[str] = [asked.upper()]
    if settings.dla is not None and asked == "int8":
        # What the DLA has no INT8 for it computes in FP16.
        flags.append("FP16")
    for flag in flags:
        _set_flag(library, config, flag, "--precision")
    if asked == "int8":
        # Quantize and dequantize nodes state the precision; a second statement would be refused.
        return
    obey = library.member("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS")
    if obey is None:
        raise _missing(library, "precision constraints", "--precision")
    config.set_flag(obey)
    _constrain(library, network, asked, settings.keep)


def _constrain(library: Library, network: Any, asked: str, keep: Collection[str]) -> None:
    types: Dict[str, Any] = {
        name: library.member("DataType", kind) for name, kind in _DATA_TYPES.items()
    }
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name not in MATRIX_LAYERS or layer.get_output(0).dtype.name not in FLOATS:
            continue
        layer.precision = types["fp32" if onnx_name(layer) in keep else asked]


def _add_profile(builder: Any, config: Any, ranges: Mapping[str, Range]) -> None:
    profile = builder.create_optimization_profile()
    for name, sizes in ranges.items():
        profile.set_shape(name, sizes.least, sizes.usual, sizes.most)
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
