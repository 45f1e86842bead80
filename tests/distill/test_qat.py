"""Quantization-aware training: what is trained is what is shipped, weight for weight."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill import qat, qat_graph
from edgekd.distill.objective import Objective
from edgekd.distill.qat import (
    FROZEN_FROM,
    PreparedStudent,
    QatResult,
    check_training,
    terms_of_outputs,
)
from edgekd.distill.qat_graph import computed_weights, with_plain_weights
from edgekd.distill.trainer import Trainer
from edgekd.errors import InputError, StageError
from edgekd.models import DictModel
from edgekd.models.networks import Mlp, PolicyNetwork
from edgekd.onnx.export import export_onnx
from edgekd.onnx.file import describe_onnx
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.tasks import Classification
from tests.distill.small_training import Source
from tests.progress import RecordedProgress

pytest.importorskip("torchao", reason="quantization-aware training needs the extra qat")

IMAGE = TensorSpec("image", ("batch", 1, 8, 8))
SPEC = ModelSpec((IMAGE,), (TensorSpec("logits", ("batch", 10)),))
RUNTIMES = ("cpu", "tensorrt")
EPSILON, MOMENTUM = 1e-2, 0.3


class Network(nn.Module):
    """A shortcut, dropout, a convolution with a bias, and batch norms of unusual settings."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8, EPSILON, MOMENTUM), nn.ReLU()
        )
        self.second = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(8, EPSILON, MOMENTUM)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(8 * 16, 10)

    def forward(self, image):
        x = self.first(image)
        x = F.relu(x + self.norm(self.second(x)))
        return self.linear(self.dropout(x).flatten(1))


def network(seed=0):
    torch.manual_seed(seed)
    return DictModel(Network(), SPEC)


class Digits(Source):
    """Batches of scikit-learn's digits; ``stop_in`` is interrupted in the middle of that epoch."""

    def __init__(self, rows, stop_in=None):
        data = load_digits()
        self.image = torch.tensor(data.images[rows, None] / 16.0, dtype=torch.float32)
        self.label = torch.tensor(data.target[rows])
        self.batch, self.stop_in, self.poison = 32, stop_in, None


TRAIN, HELD_OUT = slice(0, 640), slice(640, 900)


def fit(model, folder, stop_in=None, epochs=3, **keys):
    keys = {"batch_size": 32, "learning_rate": 3e-3, **keys}
    task = Classification()
    return Trainer(
        model,
        Objective.supervised(task),
        Digits(TRAIN, stop_in),
        Digits(HELD_OUT),
        task,
        TrainConfig(epochs=epochs, **keys),
        0,
        checkpoint_folder=folder,
        progress=RecordedProgress(),
    ).fit()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The float32 network, trained briefly on the digits."""
    model = network()
    fit(model, tmp_path_factory.mktemp("float"))
    return model


@pytest.fixture(scope="module")
def untrained_graphs(trained):
    """Prepared for each runtime: to be copied, for preparing takes a second."""
    return {runtime: PreparedStudent(trained, runtime) for runtime in RUNTIMES}


@pytest.fixture
def prepared(untrained_graphs):
    return lambda runtime: copy.deepcopy(untrained_graphs[runtime])


@pytest.fixture(scope="module")
def results(trained, untrained_graphs, tmp_path_factory):
    """Trained and converted for a runtime; with the averaging of weights for one of them."""

    @cache
    def build(runtime):
        keys = {"ema": 0.9} if runtime == "cpu" else {}
        folder = tmp_path_factory.mktemp(runtime)
        graph = copy.deepcopy(untrained_graphs[runtime])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qat, "PreparedStudent", lambda *_: graph)
            found = qat.quantization_aware(
                trained, runtime, lambda model: fit(model, folder / "training", **keys)
            )
        export_onnx(found.model, folder / "student.onnx", 18, {"edgekd.role": "student"})
        return found, folder / "student.onnx"

    return build


@pytest.fixture(params=RUNTIMES)
def result(request, results):
    return request.param, *results(request.param)


def answers(model, image):
    with torch.inference_mode():
        return model({"image": image})["logits"].numpy()


def largest_move(path):
    """How far the logits move when every input of the last layer moves by one step."""
    model = onnx.load(path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    value, weight = (makers[name] for name in gemm.input[:2])
    rows = tensors[weight.input[0]].astype(np.float64) * tensors[weight.input[1]][:, None]
    return float(tensors[value.input[1]] * np.abs(rows).sum(1).max())


def test_converted_gives_the_answers_that_were_validated(result):
    _, found, path = result
    image = Digits(HELD_OUT).image
    apart = np.abs(answers(found.prepared, image) - answers(found.model, image))
    # Both compute the same but for the order of float32 operations: an activation at the edge
    # between two steps may fall to either side, few of them do.
    assert apart.max() <= largest_move(path)
    assert np.median(apart) < 1e-5


def test_trained_well(result):
    _, found, _ = result
    digits = Digits(HELD_OUT)
    accuracy = (answers(found.model, digits.image).argmax(1) == digits.label.numpy()).mean()
    assert accuracy == pytest.approx(max(e.validation for e in found.history.epochs), abs=0.01)
    assert accuracy > 0.8  # chance is 0.1


@pytest.mark.parametrize("size", [1, 2, 7])
def test_file_gives_the_converted_answers_at_any_batch_size(result, size):
    _, found, path = result
    image = Digits(HELD_OUT).image[:70]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = [
        session.run(None, {"image": image[start : start + size].numpy()})[0]
        for start in range(0, 70, size)
    ]
    apart = np.abs(np.concatenate(rows) - answers(found.model, image))
    assert apart.max() <= largest_move(path)


def test_file_has_the_signature_and_metadata_of_any_other(result):
    _, _, path = result
    info = describe_onnx(path)
    assert info.spec == SPEC
    assert info.opset == 18
    assert info.metadata["edgekd.role"] == "student"


def test_weights_are_stored_in_eight_bits_and_batch_norm_is_folded(result):
    runtime, _, path = result
    model = onnx.load(path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = [t for t in tensors.values() if t.ndim > 1]
    assert sorted(t.shape for t in weights) == [(8, 1, 3, 3), (8, 8, 3, 3), (10, 128)]
    assert all(t.dtype == np.int8 and t.min() >= -127 for t in weights)
    # The largest weight of every channel is at the end of the grid.
    assert all((np.abs(t.reshape(len(t), -1)).max(1) == 127).all() for t in weights)
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"QuantizeLinear", "DequantizeLinear", "Conv", "Add", "Relu", "Gemm"} | (
        {"Reshape"} & kinds
    )
    zeros = [tensors[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(zeros) >= 4
    assert {zero.dtype for zero in zeros} == {np.dtype("u1" if runtime == "cpu" else "i1")}
    if runtime == "tensorrt":
        assert not any(zero.any() for zero in zeros)


def test_folding_is_that_of_the_trained_batch_norm(result):
    """Against γ/√(v + ε) from the network's own weights, its ε far from the usual one."""
    _, found, path = result
    state = {key.rpartition("module.")[2]: t for key, t in found.prepared.state_dict().items()}
    factor = state["norm.weight"] / torch.sqrt(state["norm.running_var"] + EPSILON)
    weight = (state["second.weight"] * factor[:, None, None, None]).numpy()
    bias = (state["norm.bias"] - state["norm.running_mean"] * factor).numpy()
    model = onnx.load(path)
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    second = [node for node in model.graph.node if node.op_type == "Conv"][1]
    stored = makers[second.input[1]]
    scale = tensors[stored.input[1]][:, None, None, None]
    apart = np.abs(tensors[stored.input[0]] * scale - weight)
    assert (apart <= 0.501 * scale).all()  # half a step, and float32's last digits
    np.testing.assert_allclose(tensors[second.input[2]], bias, rtol=1e-4, atol=1e-6)


def test_cpu_computes_in_integers(results, tmp_path):
    _, path = results("cpu")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2
    assert kinds.count("QLinearAdd") == 1
    assert not {"Conv", "FusedConv", "Add", "Relu"} & set(kinds)


def test_tensorrt_takes_it(results):
    _, path = results("tensorrt")
    trt = pytest.importorskip("tensorrt_rtx", reason="the TensorRT parser: extra rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, logger)
    taken = parser.parse(path.read_bytes())
    assert taken, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert definition.get_input(0).shape[0] == -1


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_gradient_reaches_every_weight(prepared, runtime):
    model = prepared(runtime).train()
    batch = next(Digits(TRAIN).epoch(0, 1))
    F.cross_entropy(model(batch)["logits"], batch["label"]).backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        # A bias before a batch norm is taken out again by its mean.
        if name.rpartition("module.")[2] != "first.0.bias"
        and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert not without
    assert len(list(model.parameters())) == len(list(network().parameters()))


def test_float_weights_are_not_touched(trained, tmp_path, prepared):
    before = copy.deepcopy(trained.state_dict())
    fit(prepared("cpu"), tmp_path, epochs=1)
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())


def ranges(model):
    state = model.state_dict()
    kinds = ("min_val", "max_val", "running_mean", "running_var")
    return {key: value.clone() for key, value in state.items() if key.endswith(kinds)}


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_validation_leaves_statistics_alone(prepared):
    model = prepared("cpu").train()
    batch = next(Digits(TRAIN).epoch(0, 1))
    model(batch)
    model.eval()
    model(batch)
    before = ranges(model)
    first = answers(model, batch["image"])
    model({"image": 9 * batch["image"] - 3})
    # A weight's range is set to what it is already, but for the last digit.
    after = ranges(model)
    assert all(torch.allclose(before[key], after[key], rtol=1e-6) for key in before)
    np.testing.assert_array_equal(first, answers(model, batch["image"]))


def test_statistics_are_frozen_late_in_training(prepared):
    model = prepared("tensorrt").train()
    batch = next(Digits(TRAIN).epoch(0, 1))
    model(batch)
    before = ranges(model)
    model.on_progress(FROZEN_FROM - 0.01)
    model({"image": 3 * batch["image"]})
    assert {key.rpartition(".")[2] for key in changed(before, ranges(model))} >= {
        "max_val",
        "running_mean",
        "running_var",
    }
    model.on_progress(FROZEN_FROM)
    model(batch)
    before = ranges(model)
    model({"image": 5 * batch["image"]})
    after = ranges(model)
    assert all(torch.allclose(before[key], after[key], rtol=1e-6) for key in before)
    # Dropout is not: two passes differ.
    assert not torch.equal(model(batch)["logits"], model(batch)["logits"])


@pytest.mark.parametrize(
    ("runtime", "keys"), [("cpu", {"ema": 0.8}), ("tensorrt", {"channels_last": False})]
)
def test_stopped_and_gone_on_with_gives_the_very_same_network(prepared, tmp_path, runtime, keys):
    straight, stopped, again = prepared(runtime), prepared(runtime), prepared(runtime)
    fit(straight, tmp_path / "straight", **keys)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, tmp_path / "stopped", stop_in=3, **keys)
    history = fit(again, tmp_path / "stopped", **keys)
    assert len(history.epochs) == 3
    one, other = straight.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert not {key for key in one if not torch.equal(one[key], other[key])}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_steps_of_activations_follow_their_range(prepared, runtime):
    """The step and zero point in training are those of the scheme, and so are the converted."""
    model = prepared(runtime).train()
    image = next(Digits(TRAIN).epoch(0, 1))["image"]  # from 0 to 1, and no value is negative
    model({"image": image})
    first = model.module.graph.activation_post_process_0
    step = 1 / 255 if runtime == "cpu" else 1 / 127.5
    assert float(first.scale) == pytest.approx(step, rel=1e-6)
    assert int(first.zero_point) == 0
    nodes = [n for n in model.convert().module.graph.graph.nodes if "quantize_per_tensor" in n.name]
    assert nodes[0].args[1] == pytest.approx(step, rel=1e-6)


def test_averaged_ranges_decide_the_step_that_is_validated(prepared):
    """An average of weights also averages ranges, but cannot average zero points."""
    model = prepared("cpu").train()
    model(next(Digits(TRAIN).epoch(0, 1)))
    first = model.module.graph.activation_post_process_0
    first.activation_post_process.min_val.fill_(-0.5)
    model.eval()
    assert float(first.scale) == pytest.approx(1.5 / 255, rel=1e-6)
    assert int(first.zero_point) == 85  # 0.5 / (1.5 / 255)


def test_channel_that_is_switched_off_is_no_nan(tmp_path):
    model = network()
    with torch.no_grad():
        model.module.norm.weight.zero_()
    student = PreparedStudent(model, "cpu").train()
    batch = next(Digits(TRAIN).epoch(0, 1))
    loss = F.cross_entropy(student(batch)["logits"], batch["label"])
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters())
    assert np.isfinite(answers(student.convert(), batch["image"])).all()


def test_two_inputs_and_two_outputs(tmp_path):
    inputs = (IMAGE, TensorSpec("state", ("batch", 5)))
    outputs = (TensorSpec("action", ("batch", 2, 3)), TensorSpec("value", ("batch", 1)))
    torch.manual_seed(0)
    model = DictModel(
        PolicyNetwork(inputs, outputs, widths=(4,), blocks=(), hidden=8), ModelSpec(inputs, outputs)
    )
    student = PreparedStudent(model, "tensorrt").train()
    batch = {"image": torch.rand(9, 1, 8, 8), "state": torch.randn(9, 5), "target": torch.zeros(9)}
    student(batch)
    converted = student.convert()
    path = tmp_path / "policy.onnx"
    export_onnx(converted, path)
    assert describe_onnx(path).spec == model.spec
    with torch.no_grad():
        exact, rounded = model.eval()(batch), converted(batch)
    for name in exact:
        assert rounded[name].shape == exact[name].shape
        # Eight bits through four layers: some hundredths, and not another function.
        assert float((rounded[name] - exact[name]).abs().max()) < 0.1 * float(
            exact[name].abs().max()
        )


def test_file_is_a_quarter_as_large(tmp_path):
    spec = ModelSpec((TensorSpec("x", ("batch", 64)),), (TensorSpec("y", ("batch", 4)),))
    torch.manual_seed(0)
    model = DictModel(Mlp(spec.inputs, spec.outputs, hidden=(512, 256)), spec)
    student = PreparedStudent(model, "cpu").train()
    student({"x": torch.randn(8, 64)})
    export_onnx(model, tmp_path / "float.onnx")
    export_onnx(student.convert(), tmp_path / "int8.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("float.onnx", "int8.onnx")]
    assert sizes[1] < 0.3 * sizes[0]  # the biases, scales and names are not quartered


class Own(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.linear, self.call = nn.Linear(64, 10), call

    def forward(self, image):
        return self.call(self, image.flatten(1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: x[:, :10] * m.linear.bias, InputError, "no convolution or linear layer"),
        (
            lambda m, x: m.linear(x) * (2 if m.training else 1),
            InputError,
            "graph of the network does not reproduce its outputs",
        ),
        (lambda m, x: m.linear(x if x.sum() > 0 else -x), StageError, "cannot be prepared"),
    ],
)
def test_network_that_does_not_fit_is_refused(call, error, message):
    torch.manual_seed(0)
    with pytest.raises(error, match=message) as caught:
        PreparedStudent(DictModel(Own(call), SPEC), "cpu")
    assert caught.value.remedy


def test_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setattr(qat_graph, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'edgekd\[qat\]'"):
        qat.quantization_aware(network(), "cpu", lambda model: pytest.fail("called"))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        qat.quantization_aware(network(), "cpu", lambda model: pytest.fail("called"))


@pytest.mark.parametrize("keys", [{"precision": "bfloat16"}, {"compile": True}])
def test_training_that_cannot_be_is_refused(keys):
    with pytest.raises(InputError, match="quantize.qat." + next(iter(keys))):
        check_training(TrainConfig(**keys))


OUTPUTS = LossTerm(name="soft_labels", args={"temperature": 4.0})
LAYERS = LossTerm(name="fitnet", args={"student": "first", "teacher": "features"})
OF_TEACHER = LossTerm(name="rkd", args={"teacher": "features"})


def test_terms_of_layers_are_left_out():
    kept, left_out = terms_of_outputs([OUTPUTS, LAYERS, OF_TEACHER], None)
    assert kept == (OUTPUTS, OF_TEACHER)
    assert left_out == ("fitnet",)


def test_own_terms_replace_the_others():
    assert terms_of_outputs([LAYERS], [OUTPUTS]) == ((OUTPUTS,), ())


@pytest.mark.parametrize(
    ("terms", "own", "where"),
    [
        ([LAYERS], None, "distill.losses"),
        ([LAYERS, OUTPUTS.model_copy(update={"weight": 0.0})], None, "distill.losses"),
        ([OUTPUTS], [OUTPUTS, LAYERS], r"quantize.qat.losses\[1\].fitnet"),
    ],
)
def test_no_term_left_is_an_error(terms, own, where):
    with pytest.raises(InputError, match=where):
        terms_of_outputs(terms, own)


def test_result_is_what_was_trained(result):
    _, found, _ = result
    assert isinstance(found, QatResult)
    assert isinstance(found.prepared, PreparedStudent)
    assert len(found.history.epochs) == 3
    # The training loop reports its progress.
    assert found.prepared.module.frozen


def test_weights_of_seven_bits_where_the_processor_needs_them(tmp_path):
    spec = ModelSpec((TensorSpec("x", ("batch", 16)),), (TensorSpec("y", ("batch", 4)),))
    torch.manual_seed(0)
    model = DictModel(Mlp(spec.inputs, spec.outputs, hidden=(8,)), spec)
    student = PreparedStudent(model, "cpu", reduce_range=True).train()
    student({"x": torch.randn(8, 16)})
    export_onnx(student.convert(), tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    weights = [numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 2]
    assert [w.dtype for w in weights] == [np.int8] * 2
    # The largest weight of every output is at the end of the grid.
    assert all((np.abs(w).max(1) == 63).all() or (np.abs(w).max(0) == 63).all() for w in weights)


class Normed(Network):
    """Two of its weights are recomputed in each forward pass."""

    def __init__(self, of_weight, of_spectrum):
        super().__init__()
        self.second = of_spectrum(self.second)
        self.linear = of_weight(self.linear)


NORMS = {
    "parametrizations": (
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ),
    "hooks": (nn.utils.weight_norm, nn.utils.spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norms", NORMS)
def test_computed_weights_become_plain_ones_and_the_network_keeps_its_own(norms, tmp_path):
    torch.manual_seed(0)
    model = DictModel(Normed(*NORMS[norms]), SPEC).eval()
    batch = {"image": torch.randn(6, 1, 8, 8)}
    before = model(batch)["logits"]
    assert set(computed_weights(model)) == {"second.weight", "linear.weight"}
    plain = with_plain_weights(model)
    assert computed_weights(plain) == ()
    torch.testing.assert_close(plain(batch)["logits"], before, rtol=0, atol=1e-5)
    prepared = PreparedStudent(model, "cpu")
    prepared.train()
    prepared(batch)["logits"].sum().backward()
    export_onnx(prepared.convert(), tmp_path / "int8.onnx", 18, {})
    assert describe_onnx(tmp_path / "int8.onnx").spec.outputs[0].name == "logits"
    assert set(computed_weights(model)) == {"second.weight", "linear.weight"}
    torch.testing.assert_close(model(batch)["logits"], before, rtol=0, atol=1e-5)


class Standardized(Network):
    """The weight of a convolution is centred in forward."""

    def forward(self, image):
        x = self.first(image)
        weight = self.second.weight
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        x = F.relu(x + self.norm(F.conv2d(x, centred, padding=1)))
        return self.linear(x.flatten(1))


class Transposed(Network):
    """One weight is another's, transposed."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(128, 128)

    def forward(self, image):
        x = self.inner(self.first(image).flatten(1))
        return self.linear(F.linear(x, self.inner.weight.t()))


@pytest.mark.parametrize("network", [Standardized, Transposed])
def test_a_weight_that_forward_computes_is_refused_before_the_training(network):
    with pytest.raises(InputError, match="is computed in forward") as caught:
        PreparedStudent(DictModel(network(), SPEC), "cpu")
    assert "parametriz" in caught.value.remedy


def test_outputs_in_the_users_units_stay_so_in_int8():
    model = DictModel(Network(), SPEC).eval()
    model.scale_output(torch.tensor(1e4), torch.full((10,), 1e5))
    batch = {"image": torch.randn(6, 1, 8, 8)}
    prepared = PreparedStudent(model, "cpu")
    prepared.train()
    prepared(batch)
    answers = prepared.convert()(batch)["logits"]
    assert float((answers - model(batch)["logits"]).abs().max()) < 3e4
    assert abs(float(answers.mean()) - 1e5) < 2e4
