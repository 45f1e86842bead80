"""Which of the student's files is taken where none is timed."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from edgekd.stages.engine_builders import StudentVariant, lowest_precision


def way(name, method=None, drop=0.0, kept=()):
    entry = {"method": method, "drop": drop, "kept": list(kept)} if method else {}
    return StudentVariant(name, Path(f"{name}.onnx"), entry)


FLOAT = way("float32")


@pytest.mark.parametrize(
    ("ways", "taken"),
    [
        ([FLOAT, way("fp16", "fp16"), way("int8", "static")], "int8"),
        ([FLOAT, way("fp16", "fp16"), way("int8", "static", drop=0.02)], "fp16"),
        ([FLOAT, way("int8", "static", drop=0.02)], "float32"),
        # The layer at the input has its weights in 32 bits in one of them.
        ([FLOAT, way("int8", "static", 0.001), way("input", "static", 0.0, ["conv"])], "int8"),
        ([FLOAT, way("int8", "static", 0.001), way("qat", "qat", 0.0)], "qat"),
    ],
)
def test_the_narrowest_within_the_drop(ways, taken):
    quantize = SimpleNamespace(max_drop=0.01)
    context = SimpleNamespace(job=SimpleNamespace(config=SimpleNamespace(quantize=quantize)))
    assert lowest_precision(context, ways).name == taken
