"""Models from ONNX text or built node by node, and what a quantized file is made of."""

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def parse_onnx(text, weights=(), *, opset=17, ir=8, domains=(), metadata=None):
    """A model from ONNX text, for example
    ``(float[b,4] x) => (float[b,3] y) { [fc] y = MatMul (x, w) }``.

    ``float x`` is a scalar, ``float[] x`` is of unknown shape, ``float[?] x`` of unknown size.
    ``weights``: the arrays that become initializers, by name; ``domains``: further operator sets.
    """
    opsets = ", ".join(
        f'"{name}" : {version}' for name, version in {"": opset, **dict(domains)}.items()
    )
    model = onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{opsets}]> g {text}")
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in dict(weights).items()
    )
    helper.set_model_props(model, metadata or {})
    return model


def save_onnx(path, text, weights=(), **settings):
    """:func:`parse_onnx` into a file; its path."""
    onnx.save(parse_onnx(text, weights, **settings), str(path))
    return path


def save_external(model, path, location="w.bin"):
    """Save a model, or the one in a file, with its weights in a second file; the path."""
    model = model if isinstance(model, onnx.ModelProto) else onnx.load(str(model))
    settings = {"save_as_external_data": True, "location": location, "size_threshold": 0}
    onnx.save(model, str(path), **settings)
    return path


class Graph:
    """Collects nodes and weights; ``save`` writes the model."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights = [], []

    def weight(self, name, *shape, scale=0.3, dtype=np.float32):
        values = (self.random.standard_normal(shape) * scale).astype(dtype)
        return self.constant(name, values)

    def constant(self, name, values):
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, op, inputs, output, name=None, **attributes):
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(op, inputs, outputs, name or op.lower(), **attributes))
        return outputs[0]

    def batch_norm(self, source, output, channels):
        parts = [
            self.constant(f"{output}.{part}", self.random.uniform(low, high, channels).astype("f4"))
            for part, low, high in (
                ("scale", 0.5, 2),
                ("shift", -1, 1),
                ("mean", -1, 1),
                ("variance", 0.5, 2),
            )
        ]
        return self.add("BatchNormalization", [source, *parts], output, f"{output}.norm")

    def save(self, path, inputs, outputs, opset=17, ir=8, metadata=None):
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = ir
        helper.set_model_props(model, metadata or {})
        onnx.save(model, str(path))
        return path


def run(path, feed):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def weights_of(path):
    graph = onnx.load(str(path)).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def types_of(path):
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def pairs_of(path):
    """The Q/DQ graph as {node name: which of its inputs a DequantizeLinear gives}."""
    graph = onnx.load(str(path)).graph
    given = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {n.name: [name in given for name in n.input] for n in graph.node}


def distance(reference, candidate):
    """The largest difference over the largest reference value."""
    return float(np.abs(candidate - reference).max() / np.abs(reference).max())
