"""Dynamic INT8: weights in 8 bits, the scales of activations measured at each run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode, add_infer_metadata

from edgekd.config.host import saturates
from edgekd.onnx.samples import Samples
from edgekd.quantization.node_selection import nothing_to_quantize
from edgekd.quantization.prepare import prepare_onnx
from edgekd.quantization.rewrites import assign, drop_unused, set_aside_outputs
from edgekd.quantization.weights_only import check_finite_weight, dequantize_weights

# Without an 8-bit kernel for dynamic scales: their weights are stored in 8 bits.
_STORED = {"GRU", "RNN", "LSTM", "Gather", "Einsum"}
# The quantizer splits every Gemm that it recognizes, also excluded ones.
_HIDDEN = "KeptGemm"


def quantize_dynamic(
    onnx_path: Path,
    out: Path,
    *,
    keep: Collection[str] = (),
    samples: Samples | None = None,
) -> None:
    """Quantize MatMul, Gemm, LSTM and Attention without samples, for transformers and recurrent
    networks.

    int8 weights per channel; activations become uint8 with a scale of each run, in ONNX Runtime's
    operators. GRU, RNN, Einsum and embedding tables have int8 weights and compute in float.
    Convolutions stay in float: ONNX Runtime's dynamic ones are slower than those.

    Args:
        onnx_path: a float32 model.
        out: where to write.
        keep: names of nodes that stay in float.
        samples: real inputs that the preparation is checked on; random where None.

    Raises:
        InputError: the model is broken, quantized already or too old; ``keep`` names no node; there
            is nothing to quantize, or weights are not finite.
        StageError: the file cannot be written, or the prepared model's outputs differ from the
        file's.
    """
    prepared = prepare_onnx(onnx_path, samples)
    kept = prepared.named(keep)
    model = prepared.copy()
    _split_gemms(model.graph, kept)
    weights = _float_weights(model.graph)
    chosen = [node for node in model.graph.node if node.name not in kept and _fits(node, weights)]
    if chosen:
        for name in {name for node in chosen for name in node.input} & weights.keys():
            check_finite_weight(weights[name], onnx_path)
        names, types = [n.name for n in chosen], sorted({n.op_type for n in chosen})
        add_infer_metadata(model)
        _rename_type(model.graph, "Gemm", _HIDDEN)
        put_outputs_back = set_aside_outputs(model.graph)
        quantizer = ONNXQuantizer(
            model,
            True,
            saturates(),
            QuantizationMode.IntegerOps,
            False,
            QuantType.QInt8,
            QuantType.QUInt8,
            None,
            names,
            [],
            types,
            {"MatMulConstBOnly": True},
        )
        model = quantizer.quantize_model()
        put_outputs_back(model.graph)
        quantizer.model.topological_sort()
        _rename_type(model.graph, _HIDDEN, "Gemm")
        drop_unused(model.graph)
    stored = dequantize_weights(model.graph, _STORED, kept, onnx_path)
    if not chosen and not stored:
        raise nothing_to_quantize(prepared, {"MatMul", "Gemm", "Attention", *_STORED}, kept)
    prepared.write(model, out)


def _float_weights(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _fits(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> bool:
    settings = {a.name: a.i for a in node.attribute}
    if node.op_type == "MatMul":
        weight = weights.get(node.input[1])
        return weight is not None and len(weight.dims) == 2 and node.input[0] not in weights
    if node.op_type == "LSTM":
        # The dynamic kernel supports neither of the other settings.
        plain = not settings.get("layout") and not settings.get("input_forget")
        return plain and node.input[1] in weights and node.input[2] in weights
    if node.op_type == "Attention" and node.domain == "com.microsoft":
        return node.input[1] in weights and "qkv_hidden_sizes" not in settings
    return False


def _rename_type(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        if node.op_type == old:
            node.op_type = new


def _split_gemms(graph: onnx.GraphProto, keep: Collection[str]) -> None:
    """Gemm(A, B, C) becomes MatMul of the same name and Add, for which there is a dynamic form."""
    weights = {t.name: t for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        scaled = settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0
        if (
            node.op_type != "Gemm"
            or node.name in keep
            or scaled
            or settings.get("transA")
            or weight is None
            or weight.data_type != TensorProto.FLOAT
        ):
            nodes.append(node)
            continue
        name = weight.name
        if settings.get("transB"):
            name = f"{weight.name}.transposed"
            if name not in weights:
                values = onnx.numpy_helper.to_array(weight).T.copy()
                weights[name] = onnx.numpy_helper.from_array(values, name)
                graph.initializer.append(weights[name])
        output = node.output[0]
        biased = len(node.input) > 2 and bool(node.input[2])
        product = f"{output}.product" if biased else output
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product], node.name))
        if biased:
            graph.value_info.append(helper.make_tensor_value_info(product, TensorProto.FLOAT, None))
            nodes.append(
                helper.make_node("Add", [product, node.input[2]], [output], f"{node.name}.bias")
            )
    assign(graph.node, nodes)
    drop_unused(graph)
