"""The builder's configuration: flags, profile, requested and actual precision of layers.

In a strongly typed network the types are the model's own, so that "asked for INT8 and got FP32"
is known before anything is built, and without a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Mapping, Sequence, Tuple

from edgerun.errors import BadInput
from edgerun.tensorrt.library import Library
from edgerun.tensorrt.network import Parsed
from edgerun.tensorrt.settings import BuildSettings, Range

UNKNOWN = "unknown"

MATRIX_LAYERS = (
    "CONVOLUTION",
    "DECONVOLUTION",
    "MATRIX_MULTIPLY",
    "FULLY_CONNECTED",
    "EINSUM",
)
"""Layers that do nearly all of a network's arithmetic: those that a requested precision applies
to.
"""

FLOATS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}

QUANTIZED = {"INT8": "int8", "FP8": "fp8", "INT4": "int4", "FP4": "fp4"}

NARROW = frozenset(QUANTIZED.values())

ENOUGH = {
    "fp32": frozenset({"fp32"}),
    "fp16": NARROW | {"fp16"},
    "bf16": NARROW | {"bf16"},
    "int8": NARROW,
}
"""Requested precision → precisions that satisfy it."""

NAMED = 5

_ONNX_NAME = re.compile(r"\[ONNX Layer: (?P<name>[^\]]*)\]")

_MOVES = ("SHUFFLE", "IDENTITY", "SQUEEZE", "UNSQUEEZE", "SLICE")

_NOT_COMPUTED = (*_MOVES, "CONSTANT", "SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE")

_REMEDY = {
    "fp32": "build the model that was not converted or quantized",
    "fp16": "convert the model to fp16 first (edgekd quantize MODEL.onnx --method fp16)",
    "bf16": "convert the model to bf16 first (edgekd quantize MODEL.onnx --method bf16)",
    "int8": "quantize it first: edgekd quantize MODEL.onnx --for tensorrt --calibration DATA "
    "-o OUT.onnx",
}


@dataclass(frozen=True)
class Layers:
    """Precisions of a network's or an engine's layers.

    Attributes:
        source: ``network`` or ``engine``.
        by_precision: how many layers compute in each.
        matrix: precision → names of the convolutions and matrix products that compute in it.
        names: all ONNX nodes that became layers.
    """

    source: str
    by_precision: Mapping[str, int]
    matrix: Mapping[str, Tuple[str, ...]]
    names: frozenset[str]

    @property
    def matrix_names(self) -> Tuple[str, ...]:
        """The convolutions and matrix products."""
        return tuple(name for names in self.matrix.values() for name in names)

    def to_json(self) -> Dict[str, Any]:
        """A plain mapping for a JSON file."""
        return {
            "source": self.source,
            "by_precision": dict(self.by_precision),
            "matrix": {precision: list(names) for precision, names in self.matrix.items()},
        }


def network_layers(network: Any) -> Layers:
    """The precisions of a parsed network's layers."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }
    counts: Counter[str] = Counter()
    matrix: Dict[str, List[str]] = {}
    for layer in layers:
        precision = _layer_precision(layer, makers)
        if precision is None:
            continue
        counts[precision] += 1
        if layer.type.name in MATRIX_LAYERS:
            matrix.setdefault(precision, []).append(onnx_name(layer))
    return Layers(
        "network",
        dict(counts),
        {precision: tuple(names) for precision, names in matrix.items()},
        frozenset(onnx_name(layer) for layer in layers),
    )


def onnx_name(layer: Any) -> str:
    """The name of a layer's ONNX node, else the layer's own."""
    match = _ONNX_NAME.search(getattr(layer, "metadata", "") or "")
    return match.group("name") if match else str(layer.name)


def metadata_names(metadata: str) -> Tuple[str, ...]:
    """All ONNX nodes in the metadata of an engine's layer, in which several may be fused."""
    return tuple(_ONNX_NAME.findall(metadata))


def check_keep(layers: Layers, keep: Collection[str]) -> None:
    """Raise BadInput for an excluded node that the model does not have."""
    missing = sorted(set(keep) - layers.names)
    if missing:
        raise BadInput(
            f"the model has no layer {', '.join(map(repr, missing))}",
            where="--keep",
            remedy=f"its convolutions and matrix products: {_some(layers.matrix_names)}",
        )


def check_precision(layers: Layers, asked: str | None, keep: Collection[str], where: str) -> None:
    """Check the convolutions and matrix products against the requested precision.

    A model without any must have at least one layer in it. Layers of unknown precision
    are not counted as violations.

    Raises:
        BadInput: layers not among ``keep`` compute in another one; they are counted and named.
    """
    if asked is None:
        return
    wrong = {
        precision: kept_out
        for precision, names in layers.matrix.items()
        if precision not in ENOUGH[asked] and precision != UNKNOWN
        for kept_out in [tuple(name for name in names if name not in keep)]
        if kept_out
    }
    if wrong:
        total = len(layers.matrix_names)
        found = "; ".join(
            f"{len(names)} of {total} in {precision.upper()}: {_some(names)}"
            for precision, names in wrong.items()
        )
        raise BadInput(
            f"{asked.upper()} was asked for, and of the convolutions and matrix products there "
            f"are {found}",
            where=where,
            remedy=f"{_REMEDY[asked]}; or name those that are meant to stay so: --keep NODE",
        )
    if not layers.matrix and not ENOUGH[asked] & set(layers.by_precision):
        found = ", ".join(p.upper() for p in layers.by_precision) or "none"
        raise BadInput(
            f"{asked.upper()} was asked for and no layer computes in it; there is {found}",
            where=where,
            remedy=_REMEDY[asked],
        )


def _layer_precision(layer: Any, makers: Mapping[str, Any]) -> str | None:
    """None for layers that only move or convert, and for those of sizes and indices."""
    kind = layer.type.name
    if kind in _NOT_COMPUTED or not layer.num_outputs:
        return None
    if kind in MATRIX_LAYERS:
        # Input 2 of a convolution is its bias; without input 1 its weights are a float constant.
        count = layer.num_inputs if kind == "EINSUM" else min(layer.num_inputs, 2)
        operands = [_operand(layer.get_input(index), makers) for index in range(count)]
        narrow = {operand for operand in operands if operand in NARROW}
        if count > 1 and all(operand in NARROW for operand in operands):
            return "int8" if "int8" in narrow else sorted(narrow)[0]
    dtype = layer.get_output(0).dtype.name
    return {**FLOATS, **QUANTIZED}.get(dtype)


def _operand(tensor: Any, makers: Mapping[str, Any]) -> str | None:
    """The quantized type of an operand's source, through layers that only move it."""
    while tensor is not None and tensor.name in makers:
        layer = makers[tensor.name]
        if layer.type.name == "DEQUANTIZE":
            return QUANTIZED.get(layer.get_input(0).dtype.name)
        if layer.type.name not in _MOVES:
            return None
        tensor = layer.get_input(0)
    return None


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:NAMED])
    return f"{shown}, …" if len(names) > NAMED else shown or "none"


_DATA_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


def is_weakly_typed(library: Library, settings: BuildSettings) -> bool:
    """Whether the precision is requested from the builder.

    Only TensorRT before 11 supports that, and only for types other than float32; otherwise the
    types are the model's.
    """
    return library.weakly_typed and settings.precision not in (None, "fp32")


def check_settings(library: Library, settings: BuildSettings) -> None:
    """Raise BadInput for settings that this library does not support, before the model is read."""
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
        # Tried with 1.7.1: the level is accepted, and the engine is byte-identical.
        raise BadInput(
            f"{library} does not use hardware compatibility",
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
    asked = str(settings.precision)
    flags: List[str] = [asked.upper()]
    if settings.dla is not None and asked == "int8":
        # Layers without INT8 support on the DLA compute in FP16.
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
