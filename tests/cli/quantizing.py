"""Running ``edgekd quantize``, and small models for it."""

from __future__ import annotations

import numpy as np

from tests.command_line import edgekd
from tests.onnx_builders import Graph

CLASSES = 5


def quantize(*words, **settings):
    return edgekd("quantize", *words, **settings)


def classifier(path):
    """Two convolutions and a linear layer: image (batch, 3, 8, 8) to logits (batch, 5)."""
    g = Graph(1)
    g.add("Conv", ["image", g.weight("w1", 8, 3, 3, 3)], "c1", "first", pads=[1] * 4)
    g.add("Relu", ["c1"], "r1")
    g.add("Conv", ["r1", g.weight("w2", 8, 8, 3, 3)], "c2", "second", pads=[1] * 4)
    g.add("GlobalAveragePool", ["c2"], "pooled")
    g.add("Flatten", ["pooled"], "flat")
    g.add("Gemm", ["flat", g.weight("w3", CLASSES, 8)], "logits", "head", transB=1)
    return g.save(path, {"image": ["batch", 3, 8, 8]}, {"logits": ["batch", CLASSES]})


def samples(path, count=40, seed=0):
    """Images and random labels for :func:`classifier`."""
    random = np.random.default_rng(seed)
    image = random.standard_normal((count, 3, 8, 8)).astype(np.float32)
    np.savez(path, image=image, label=random.integers(0, CLASSES, count))
    return path
