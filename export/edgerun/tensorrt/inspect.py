"""The actual layers of a built engine, from TensorRT's engine inspector.

The inspector needs the engine loaded, and that needs a GPU with its driver. Never run: there was
no GPU; the layers' form is that of the inspector's documentation for 8.4 to 10.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Mapping, Sequence

from edgerun.tensorrt.config import UNKNOWN, Layers, metadata_names
from edgerun.tensorrt.library import Library, find_gpu

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
class Inspection:
    """The content of an engine.

    Attributes:
        layers: the inspector's layers; None where the engine could not be loaded.
        tensors: its inputs and outputs.
        memory_bytes: device memory of one execution context.
        reason: the reason why it could not be loaded.
    """

    layers: List[Any] | None
    tensors: List[Any]
    memory_bytes: int | None = None
    reason: str | None = None

    def to_json(self) -> Dict[str, Any]:
        """The content of the layers file next to the engine."""
        return {"layers": self.layers, "tensors": self.tensors}


def inspect_engine(library: Library, engine: bytes, version_compatible: bool) -> Inspection:
    """Load an engine and read its layers; an engine that does not load here is no error."""
    module, log = library.module, library.log
    log.clear()
    try:
        runtime = module.Runtime(log)
        if version_compatible and hasattr(runtime, "engine_host_code_allowed"):
            # Such an engine contains host code, which is trusted here: it was built just now.
            runtime.engine_host_code_allowed = True
        loaded = runtime.deserialize_cuda_engine(engine)
    except (TypeError, RuntimeError) as error:
        return Inspection(None, [], reason=log.last_error() or str(error))
    if loaded is None:
        reason = log.last_error() or f"{library} does not load it and gives no reason"
        if find_gpu() is None:
            reason = "there is no NVIDIA GPU with its driver here"
        return Inspection(None, [], reason=reason)
    inspector = loaded.create_engine_inspector()
    try:
        seen = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))
    except ValueError as error:
        return Inspection(None, [], reason=f"the inspector's answer is not JSON: {error}")
    return Inspection(
        layers=list(seen.get("Layers", [])),
        # "I/O Tensors" since 11; the same list.
        tensors=list(seen.get("I/O Tensors") or seen.get("Bindings") or []),
        memory_bytes=_memory(loaded),
    )


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


def _memory(engine: Any) -> int | None:
    for name in ("device_memory_size_v2", "device_memory_size"):
        size = getattr(engine, name, None)
        if size is not None:
            return int(size)
    return None
