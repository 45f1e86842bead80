"""One function quantizes for the stage and for the command: what it writes, refuses and reports."""

import numpy as np
import onnx
import pytest

from edgekd.errors import CrashError, StageError
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.quantize_onnx import QuantizeSettings, quantize_onnx
from tests.onnx_builders import Graph


@pytest.fixture
def joined(tmp_path):
    """Two branches of which one is 1,000 times larger, joined before a convolution; its samples."""
    g = Graph(3)
    g.add("Conv", ["x", g.weight("w1", 8, 3, 3, 3)], "c1", "first", pads=[1] * 4)
    g.add("Mul", ["c1", g.constant("k", np.float32(1000))], "large", "scale")
    g.add("Concat", ["c1", "large"], "both", "join", axis=1)
    g.add("Conv", ["both", g.weight("w2", 4, 16, 3, 3)], "y", "second")
    path = g.save(tmp_path / "m.onnx", {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 6, 6]})
    x = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
    return path, ArraySamples({"x": x})


class Drop:
    """An evaluator to which every file with a quantized node drops by 1."""

    def drop_of(self, path):
        return 1.0


def run(joined, tmp_path, evaluator=None, opens=None, **settings):
    path, samples = joined
    out = tmp_path / "out.onnx"
    return quantize_onnx(
        path,
        out,
        evaluator,
        QuantizeSettings(**settings),
        calibration=samples,
        scratch=tmp_path / "scratch",
        opens=opens,
    )


def test_a_layer_behind_a_mixed_join_is_float32_with_that_reason(joined, tmp_path):
    found = run(joined, tmp_path)
    rows = {row.node: row for row in found.float_nodes()}
    assert rows["second"].bytes == 4 * 4 * 16 * 3 * 3
    assert rows["join"].reason == rows["second"].reason == "8 bits of one scale would lose a part"
    assert {"join", "second"} <= set(found.kept)
    assert "first" not in rows


def test_a_node_that_was_excluded_is_listed_as_such(joined, tmp_path):
    found = run(joined, tmp_path, keep=("first",), method="weights-only")
    assert [(row.node, row.reason) for row in found.float_nodes()] == [
        ("first", "excluded by name")
    ]


def test_nothing_is_written_where_every_node_costs_too_much(joined, tmp_path):
    found = run(joined, tmp_path, Drop(), max_drop=0.5)
    assert found.refused
    assert not found.path.exists()


def test_a_crash_in_the_other_process_ends_it_before_the_search(joined, tmp_path):
    def crashes(path):
        assert onnx.load(path).graph.node
        raise CrashError("ONNX Runtime crashed", signal=11)

    with pytest.raises(CrashError):
        run(joined, tmp_path, Drop(), crashes, max_drop=0.5)


def test_another_error_there_is_left_to_the_comparison(joined, tmp_path):
    def fails(path):
        raise StageError("the model does not run", where=str(path))

    assert run(joined, tmp_path, opens=fails).path.is_file()
