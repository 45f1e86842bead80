"""Small float models and their inputs."""

import numpy as np
import pytest

from tests.onnx_builders import Graph


@pytest.fixture
def graph():
    return Graph()


@pytest.fixture(scope="session")
def convolutional(tmp_path_factory):
    """Conv-BN-ReLU twice with a shortcut, pooling, Gemm; symbolic batch, metadata, opset 17."""
    g = Graph(1)
    g.add("Conv", ["image", g.weight("w1", 8, 3, 3, 3)], "c1", "first", pads=[1] * 4)
    g.add("Relu", [g.batch_norm("c1", "n1", 8)], "r1", "relu1")
    g.add(
        "Conv", ["r1", g.weight("w2", 8, 8, 3, 3), g.weight("b2", 8)], "c2", "second", pads=[1] * 4
    )
    g.add("Add", ["c2", "r1"], "sum", "shortcut")
    g.add("Relu", ["sum"], "r2", "relu2")
    g.add("GlobalAveragePool", ["r2"], "pooled", "pool")
    g.add("Flatten", ["pooled"], "flat", "flatten")
    g.add("Gemm", ["flat", g.weight("w3", 5, 8), g.weight("b3", 5)], "logits", "head", transB=1)
    path = tmp_path_factory.mktemp("float") / "convolutional.onnx"
    return g.save(
        path, {"image": ["batch", 3, 8, 8]}, {"logits": ["batch", 5]}, metadata={"labels": "a,b"}
    )


@pytest.fixture(scope="session")
def images():
    values = np.random.default_rng(2).standard_normal((70, 3, 8, 8))
    return {"image": values.astype(np.float32)}
