"""Which provider runs which node, read from ONNX Runtime; fallback against intention."""

import numpy as np
import onnx
import onnxruntime
import pytest

from edgekd.engines.provider_assignment import (
    PlacedNode,
    check_fallback,
    fallen_back,
    nodes_in_trace,
    provider_coverage,
    shape_arithmetic,
)
from edgekd.errors import InputError
from tests.onnx_builders import parse_onnx

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def flatten():
    """A reshape by a computed size, as exporters write it, and a sum with that size."""
    text = """(float[batch,3,8,8] x) => (float[] y) {
        [relu] r = Relu (x)
        [shape] s = Shape (r)
        [gather] b = Gather (s, first)
        [concat] to = Concat <axis = 0> (b, rest)
        [reshape] flat = Reshape (r, to)
        [cast] n = Cast <to = 1> (b)
        [scale] scaled = Mul (n, large)
        [add] y = Add (flat, scaled)
    }"""
    large = np.ones((1, 192), np.float32)
    return parse_onnx(text, {"first": np.array([0]), "rest": np.array([-1]), "large": large})


def test_only_what_computes_with_sizes_is_shape_arithmetic(flatten):
    """``scale`` reads a constant of 192 elements, the others values of the image."""
    assert {name for name, _ in shape_arithmetic(flatten)} == {"shape", "gather", "concat", "cast"}


def test_a_name_that_values_share_is_not_taken_for_shape_arithmetic():
    model = parse_onnx("""(float[batch,3,8,8] x) => (float[] y) {
        s = Shape (x)
        f = Cast <to = 1> (s)
        h = Cast <to = 10> (x)
        y = ReduceSum (f)
    }""")
    assert shape_arithmetic(model) == {("", "Shape"), ("", "ReduceSum")}


def test_the_body_of_a_branch_sees_the_sizes_outside():
    branch = """b () => (float[] t)
    { [inside] f = Cast <to = 1> (s)  [values] t = Mul (f, x) }"""
    text = f"""(float[batch,3,8,8] x) => (float[] y) {{
        [shape] s = Shape (x)
        [if] y = If (yes) <then_branch = {branch}, else_branch = {branch}>
    }}"""
    model = parse_onnx(text, {"yes": np.array(True)})
    assert {name for name, _ in shape_arithmetic(model)} == {"shape", "inside"}


def test_the_real_assignment_names_every_node(flatten, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(flatten, str(path))
    (row,) = provider_coverage(path, [CPU], optimization="disabled")
    if row.nodes is None:
        pytest.skip("this ONNX Runtime does not record its assignment")
    assert [placed.name for placed in row.nodes] == [n.name for n in flatten.graph.node]
    assert {placed.provider for placed in row.nodes} == {CPU}
    assert {placed.name for placed in row.nodes if placed.shape_arithmetic} == {
        *("shape", "gather", "concat", "cast")
    }


def test_the_profile_of_a_run_agrees_with_the_assignment(flatten, tmp_path):
    """The profile is what an ONNX Runtime without recorded assignments has."""
    path = tmp_path / "m.onnx"
    onnx.save(flatten, str(path))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "trace")
    session = onnxruntime.InferenceSession(str(path), options, [CPU])
    session.run(None, {"x": np.ones((2, 3, 8, 8), np.float32)})
    from_trace = nodes_in_trace(tmp_path / session.end_profiling(), path)
    (row,) = provider_coverage(path, [CPU], optimization="disabled")
    assert set(from_trace) == set(row.nodes or from_trace)


def test_a_provider_that_is_not_here_says_what_to_install(flatten, tmp_path):
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    path = tmp_path / "m.onnx"
    onnx.save(flatten, str(path))
    cuda, cpu = provider_coverage(path, [CUDA, CPU])
    assert (cuda.here, cuda.nodes) == (False, None)
    assert "onnxruntime-gpu" in cuda.install
    assert cpu.here
    with pytest.raises(InputError, match="has none of CUDAExecutionProvider"):
        provider_coverage(path, [CUDA])


def placed(*rows):
    return tuple(PlacedNode(name, op, provider, sizes) for name, op, provider, sizes in rows)


MIXED = placed(
    ("conv", "Conv", CUDA, False),
    ("shape", "Shape", CPU, True),
    ("det", "Det", CPU, False),
    ("size", "Gather", "OtherExecutionProvider", True),
)


def test_sizes_on_the_cpu_are_meant_and_anything_else_elsewhere_fell_back(tmp_path):
    """Shape arithmetic on a third device is no design of the runtime's."""
    assert [n.name for n in fallen_back(MIXED, CUDA)] == ["det", "size"]
    assert fallen_back(MIXED, CPU) == ()
    with pytest.raises(
        InputError, match=r"does not run 2 of 4 nodes .*det \(Det\), size"
    ) as caught:
        check_fallback(MIXED, CUDA, "error", tmp_path)
    assert "CPUExecutionProvider 1" in caught.value.what
    check_fallback(MIXED, CUDA, "allow", tmp_path)
    check_fallback(MIXED[:2], CUDA, "error", tmp_path)
    check_fallback(MIXED, CPU, "error", tmp_path)
    with pytest.raises(InputError, match="ran no node"):
        check_fallback(MIXED[1:2], CUDA, "error", tmp_path)


def test_of_many_fallen_nodes_the_first_few_are_named(tmp_path):
    many = placed(("conv", "Conv", CUDA, False), *((f"n{i}", "Det", CPU, False) for i in range(40)))
    with pytest.raises(InputError, match=r"40 of 41 nodes .*and 35 more") as caught:
        check_fallback(many, CUDA, "error", tmp_path)
    assert "n4" in caught.value.what
    assert "n5" not in caught.value.what
