"""The precision that each layer of a network or of an engine computes in, against the requested.

In a strongly typed network the types are the model's own, so that "asked for INT8 and got FP32"
is known before anything is built, and without a GPU. Those of an engine are its inspector's;
never run, as loading an engine needs a GPU: the layers' form is that of the inspector's
documentation for 8.4 to 10.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Mapping, Sequence, Tuple

from edgerun.errors import BadInput

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


# "Row major linear FP16 format", "Half", "Thirty-two wide channel vectorized row major Int8".
_TYPE_WORDS = (
    ("bf16", re.compile(r"bf16|bfloat16", re.I)),
    ("int8", re.compile(r"int8", re.I)),
    ("fp8", re.compile(r"fp8|e4m3", re.I)),
    ("int4", re.compile(r"int4", re.I)),
    ("fp4", re.compile(r"fp4", re.I)),
    ("fp16", re.compile(r"fp16|half|float16", re.I)),
    ("fp32", re.compile(r"fp32|float", re.I)),
)
# The operands' type in a kernel's name: sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_…
_TACTIC = re.compile(r"_(?P<type>tf32|bf16|f16|f32|i8|s8|e4m3)")
_TACTIC_TYPES = {
    "tf32": "fp32",
    "f32": "fp32",
    "bf16": "bf16",
    "f16": "fp16",
    "i8": "int8",
    "s8": "int8",
    "e4m3": "fp8",
}
_COPIES = ("Reformat", "NoOp", "Constant", "Shuffle", "Identity")


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


def check_precision(
    layers: Layers, requested: str | None, keep: Collection[str], where: str
) -> None:
    """Check the convolutions and matrix products against the requested precision.

    A model without any must have at least one layer in it. Layers of unknown precision
    are not counted as violations.

    Raises:
        BadInput: layers not among ``keep`` compute in another one; they are counted and named.
    """
    if requested is None:
        return
    wrong = {
        precision: kept_out
        for precision, names in layers.matrix.items()
        if precision not in ENOUGH[requested] and precision != UNKNOWN
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
            f"{requested.upper()} was asked for, and of the convolutions and matrix products there "
            f"are {found}",
            where=where,
            remedy=f"{_REMEDY[requested]}; or name those that are meant to stay so: --keep NODE",
        )
    if not layers.matrix and not ENOUGH[requested] & set(layers.by_precision):
        found = ", ".join(p.upper() for p in layers.by_precision) or "none"
        raise BadInput(
            f"{requested.upper()} was asked for and no layer computes in it; there is {found}",
            where=where,
            remedy=_REMEDY[requested],
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


def engine_layers(seen: Sequence[Any], matrix_names: Collection[str]) -> Layers:
    """Precisions of an engine's layers.

    Args:
        seen: the inspector's layers.
        matrix_names: the network's convolutions and matrix products, to be matched.
    """
    counts: Counter[str] = Counter()
    matrix: Dict[str, List[str]] = {}
    all_names = set()
    for layer in seen:
        if not isinstance(layer, Mapping) or layer.get("LayerType") in _COPIES:
            continue
        names = _names(layer, matrix_names)
        all_names.update(names)
        precision = _precision(layer)
        counts[precision] += 1
        for name in names:
            if name in matrix_names:
                matrix.setdefault(precision, []).append(name)
    return Layers(
        "engine",
        dict(counts),
        {precision: tuple(names) for precision, names in matrix.items()},
        frozenset(all_names),
    )


def _names(layer: Mapping[str, Any], matrix_names: Collection[str]) -> List[str]:
    """The ONNX nodes fused into an engine's layer: by its metadata, or by its own name."""
    named = list(metadata_names(str(layer.get("Metadata") or "")))
    parts = str(layer.get("Name", "")).split(" + ")
    return named or [part for part in parts if part in matrix_names] or parts


def _precision(layer: Mapping[str, Any]) -> str:
    kind = str(layer.get("LayerType", ""))
    if "ForeignNode" in str(layer.get("Name", "")) or kind.lower() == "myelin":
        # Many layers compiled into one: its inputs do not show the precision inside.
        return UNKNOWN
    weights = layer.get("Weights")
    words = [str(weights.get("Type", ""))] if isinstance(weights, Mapping) else []
    inputs = [tensor for tensor in layer.get("Inputs", []) if isinstance(tensor, Mapping)]
    words += [str(t.get("Format/Datatype") or t.get("Datatype") or "") for t in inputs[:1]]
    for word in words:
        for precision, pattern in _TYPE_WORDS:
            if pattern.search(word):
                return precision
    # "N/A due to dynamic shapes": only the chosen kernel shows the type.
    match = _TACTIC.search(str(layer.get("TacticName", "")))
    return _TACTIC_TYPES[match.group("type")] if match else UNKNOWN
