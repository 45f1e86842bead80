"""The fewest nodes in float32, against the best set of all, found by trying every one."""

import json
from itertools import combinations

import numpy as np
import onnx
import pytest

from edgekd.errors import InputError
from edgekd.onnx.inference import run_samples
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.exclusion_search import UNITS, search_float_layers
from edgekd.quantization.static import StaticQuantizer
from tests.onnx_builders import Graph, pairs_of, save_onnx

SAMPLES = ArraySamples({"x": np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)})


class Coarse:
    """A chain of MatMuls; quantizing node i rounds its weights to ``levels[i]`` steps.

    The file says in its metadata which nodes are in float. ``joins`` are names of further nodes,
    which are quantized only with one of the chain.
    """

    def __init__(self, folder, levels, seed=0, joins=()):
        random = np.random.default_rng(seed)
        self.levels, self.joins, self.folder = levels, joins, folder
        self.weights = [np.linalg.qr(random.standard_normal((8, 8)))[0] for _ in levels]
        self.chain = tuple(f"fc{index}" for index in range(len(levels)))
        self.nodes = (*self.chain, *joins)
        self.writes = 0
        self.prepared = folder / "prepared.onnx"
        self._save(self.prepared, self.nodes)

    def write(self, out, float_nodes=()):
        self.writes += 1
        assert list(float_nodes) == [node for node in self.nodes if node in float_nodes]
        if set(self.chain) <= set(float_nodes):
            raise InputError("nothing to quantize")
        self._save(out, float_nodes)

    def _save(self, path, float_nodes):
        text, weights, name = "", {}, "x"
        for index, node in enumerate(self.nodes):
            made = "y" if index == len(self.nodes) - 1 else f"t{index}"
            if node in self.joins:
                text += f"[{node}] {made} = Identity ({name})\n"
            else:
                weight = self.weights[index]
                if node not in float_nodes:
                    step = np.abs(weight).max() / self.levels[index]
                    weight = np.round(weight / step) * step
                weights[f"w{index}"] = weight.astype(np.float32)
                text += f"[{node}] {made} = MatMul ({name}, w{index})\n"
            name = made
        metadata = {"float": ",".join(float_nodes)}
        text = f"(float[b,8] x) => (float[b,8] y) {{ {text} }}"
        save_onnx(path, text, weights, metadata=metadata)


def floats_of(path):
    (entry,) = onnx.load(str(path)).metadata_props
    return frozenset(filter(None, entry.value.split(",")))


def relative_error(quantizer):
    reference = run_samples(quantizer.prepared, SAMPLES)["y"]

    def drop(path):
        answers = run_samples(path, SAMPLES)["y"]
        return float(np.linalg.norm(answers - reference) / np.linalg.norm(reference))

    return drop


def subsets(nodes):
    """All proper subsets of the nodes, the smaller first."""
    return [frozenset(s) for size in range(len(nodes)) for s in combinations(nodes, size)]


def every_drop(quantizer, drop, folder):
    found = {}
    for kept in subsets(quantizer.nodes):
        quantizer.write(folder / "each.onnx", [n for n in quantizer.nodes if n in kept])
        found[kept] = drop(folder / "each.onnx")
    return found


@pytest.mark.parametrize("ranked_by", [SAMPLES, None])
@pytest.mark.parametrize(
    ("levels", "budget"),
    [
        ((60, 60, 3, 60, 60, 60), 0.08),
        ((60, 4, 60, 3, 60, 60), 0.08),
        ((60, 2, 40, 3, 30, 5), 0.05),
        ((9, 9, 9, 9, 9, 9), 0.12),
    ],
)
def test_it_is_the_best_of_all_sets(tmp_path, levels, budget, ranked_by):
    quantizer = Coarse(tmp_path, levels)
    drop = relative_error(quantizer)
    drops = every_drop(quantizer, drop, tmp_path)
    fewest = min(len(kept) for kept, value in drops.items() if value <= budget)
    out = tmp_path / "out.onnx"
    decision = search_float_layers(quantizer, out, drop, budget, samples=ranked_by)
    assert fewest > 0
    assert len(decision.kept) == fewest
    assert decision.chosen == out
    assert floats_of(out) == set(decision.kept)
    assert decision.drop == drop(out) == drops[frozenset(decision.kept)] <= budget
    assert decision.drop_all == drops[frozenset()]
    assert set(decision.quantized) == set(quantizer.nodes) - set(decision.kept)
    assert {row.node for row in decision.rows if row.kept} == set(decision.kept)
    assert decision.measure == ("noise" if ranked_by else "drop")


def test_sensitivities_are_those_of_each_node_alone(tmp_path):
    quantizer = Coarse(tmp_path, (60, 3, 20))
    drop = relative_error(quantizer)
    drops = every_drop(quantizer, drop, tmp_path)
    alone = [drops[frozenset(quantizer.nodes) - {node}] for node in quantizer.nodes]
    by_drop = search_float_layers(quantizer, tmp_path / "a.onnx", drop, 0.1)
    assert [row.sensitivity for row in by_drop.rows] == alone
    by_noise = search_float_layers(quantizer, tmp_path / "b.onnx", drop, 0.1, samples=SAMPLES)
    # Noise is the square of the relative error.
    assert [row.sensitivity for row in by_noise.rows] == pytest.approx([v**2 for v in alone])
    assert [row.op for row in by_noise.rows] == ["MatMul"] * 3
    assert by_noise.ranked == 3
    assert by_noise.evaluations < by_drop.evaluations


def test_nothing_is_kept_where_int8_is_good_enough(tmp_path):
    quantizer = Coarse(tmp_path, (60, 60, 60))
    decision = search_float_layers(quantizer, tmp_path / "out.onnx", lambda path: -0.01, 0.0)
    assert decision.kept == ()
    assert decision.quantized == quantizer.nodes
    assert decision.evaluations == quantizer.writes == 1
    assert floats_of(tmp_path / "out.onnx") == frozenset()
    assert len(decision.lines()) == 1


@pytest.mark.parametrize("samples", [SAMPLES, None])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_where_only_float32_will_do_nothing_is_written(tmp_path, value, samples):
    quantizer = Coarse(tmp_path, (60, 60, 60, 60))
    seen = []
    decision = search_float_layers(
        quantizer,
        tmp_path / "out.onnx",
        lambda path: seen.append(floats_of(path)) or value,
        0.5,
        samples=samples,
    )
    assert decision.chosen is None
    assert decision.drop is None
    assert decision.kept == quantizer.nodes
    assert decision.quantized == ()
    assert not (tmp_path / "out.onnx").exists()
    # That no single node can be in INT8 was tried and not guessed.
    assert {frozenset(quantizer.nodes) - {node} for node in quantizer.nodes} <= set(seen)
    assert decision.evaluations == len(seen) == len(set(seen))
    json.dumps(decision.to_json(), allow_nan=False)
    assert "stays in float32" in "\n".join(decision.lines())


@pytest.mark.parametrize("seed", range(20))
def test_for_any_drops_the_result_fits_and_no_float_node_is_superfluous(tmp_path, seed):
    """Drops drawn at random for each set: more nodes in float are often worse."""
    quantizer = Coarse(tmp_path, (60,) * 6)
    random = np.random.default_rng(seed)
    table = {kept: float(random.uniform()) for kept in subsets(quantizer.nodes)}
    table[frozenset()] = 1.0
    calls = []

    def drop(path):
        calls.append(floats_of(path))
        return table[calls[-1]]

    budget = float(random.choice([0.05, 0.2, 0.5]))
    out = tmp_path / "out.onnx"
    decision = search_float_layers(quantizer, out, drop, budget)
    kept = frozenset(decision.kept)
    assert decision.evaluations == len(calls) == len(set(calls))
    if decision.chosen is None:
        single = [frozenset(quantizer.nodes) - {node} for node in quantizer.nodes]
        assert all(table[others] > budget for others in single)
        return
    assert table[kept] == decision.drop <= budget
    assert all(table[kept - {node}] > budget for node in kept)
    assert floats_of(out) == kept
    again = search_float_layers(quantizer, out, lambda path: table[floats_of(path)], budget)
    assert again == decision


@pytest.mark.parametrize("seed", range(10))
def test_where_drops_add_up_the_fewest_are_found(tmp_path, seed):
    quantizer = Coarse(tmp_path, (60,) * 7)
    random = np.random.default_rng(seed)
    cost = dict(zip(quantizer.nodes, random.exponential(size=7), strict=True))
    budget = float(random.uniform(0.1, 0.9)) * sum(cost.values())

    def total(kept):
        return sum(sorted(value for node, value in cost.items() if node not in kept))

    fewest = min(len(kept) for kept in subsets(quantizer.nodes) if total(kept) <= budget)
    decision = search_float_layers(
        quantizer, tmp_path / "out.onnx", lambda path: total(floats_of(path)), budget
    )
    assert len(decision.kept) == fewest
    assert set(decision.kept) == set(sorted(cost, key=cost.get)[len(cost) - fewest :])


@pytest.mark.parametrize("samples", [SAMPLES, None])
def test_a_join_not_quantizable_alone_is_ranked_by_its_total_cost(tmp_path, samples):
    quantizer = Coarse(tmp_path, (60, 3, 60), joins=("join",))
    drop = relative_error(quantizer)
    decision = search_float_layers(quantizer, tmp_path / "out.onnx", drop, 0.05, samples=samples)
    assert decision.kept == ("fc1",)
    # In this model the join rounds nothing.
    assert decision.rows[-1].node == "join"
    assert decision.rows[-1].sensitivity == 0.0
    nothing = search_float_layers(quantizer, tmp_path / "none.onnx", lambda path: 1.0, 0.05)
    assert nothing.chosen is None


def test_a_large_model_is_searched_in_groups_and_then_node_by_node(tmp_path):
    """Three bad nodes of 250: fewer evaluations than nodes, and no good one in float."""
    quantizer = Coarse(tmp_path, (60,) * 250)
    bad = {"fc10", "fc11", "fc200"}
    messages = []
    decision = search_float_layers(
        quantizer,
        tmp_path / "out.onnx",
        lambda path: 1.0 * len(bad - floats_of(path)),
        0.5,
        progress=messages.append,
    )
    assert set(decision.kept) == bad
    assert decision.evaluations < UNITS + 30
    assert sum("sensitivity" in message for message in messages) <= UNITS
    assert "3 of 250 stay in float32" in "\n".join(decision.lines())


def test_what_cannot_be_decided_is_refused(tmp_path):
    quantizer = Coarse(tmp_path, (60, 60))
    with pytest.raises(InputError, match="not a number"):
        search_float_layers(quantizer, tmp_path / "out.onnx", lambda path: 0.0, float("nan"))
    quantizer.nodes = ()
    with pytest.raises(InputError, match="no node that can be quantized"):
        search_float_layers(quantizer, tmp_path / "out.onnx", lambda path: 0.0, 0.1)


def test_an_error_of_the_metric_is_not_taken_for_a_bad_drop(tmp_path):
    quantizer = Coarse(tmp_path, (60, 60))

    def broken(path):
        raise InputError("labels are missing")

    with pytest.raises(InputError, match="labels are missing"):
        search_float_layers(quantizer, tmp_path / "out.onnx", broken, 0.1)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_the_layer_that_8_bits_cannot_hold_is_the_one_kept(tmp_path, runtime, bad):
    """In each column of its weights one is 1,000 times the others, for an input that is always
    0: what 8 bits leave of the rest is nothing, and the float outputs do not depend on it."""
    graph, random = Graph(3), np.random.default_rng(4)
    name = "x"
    for index in range(3):
        weights = random.standard_normal((16, 16)).astype(np.float32) / 4
        # Input 0 of the next layer is always 0, as the samples' own is.
        weights[:, 0] = 0
        if index == bad:
            weights[0, 1:] = 1000
        graph.constant(f"w{index}", weights)
        name = graph.add("MatMul", [name, f"w{index}"], f"t{index}", f"fc{index}")
        name = graph.add("Relu", [name], f"r{index}", f"relu{index}")
    graph.add("MatMul", [name, graph.weight("w3", 16, 5)], "y", "head")
    source = graph.save(tmp_path / "m.onnx", {"x": ["b", 16]}, {"y": ["b", 5]})
    inputs = random.standard_normal((64, 16)).astype(np.float32)
    inputs[:, 0] = 0
    samples = ArraySamples({"x": inputs})
    reference = run_samples(source, samples)["y"].argmax(1)

    def drop(path):
        return float((run_samples(path, samples)["y"].argmax(1) != reference).mean())

    quantizer = StaticQuantizer(source, samples, tmp_path / "scratch", runtime=runtime)
    out = tmp_path / "out.onnx"
    decision = search_float_layers(quantizer, out, drop, 0.1, samples=samples)
    assert decision.drop_all > 0.3
    assert decision.kept == (f"fc{bad}",)
    assert decision.drop == drop(out) <= 0.1
    # Its weights are float; what it is given may come from a node in 8 bits.
    assert not pairs_of(out)[f"fc{bad}"][1]
    assert pairs_of(out)["head"] == [True, True]
    assert max(decision.rows, key=lambda row: row.sensitivity).node == f"fc{bad}"
