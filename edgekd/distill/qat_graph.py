"""The torchao quantizer for QAT, and the batch norms and weights within the exported graph.

torchao is imported when it is needed: it is an extra, and importing it takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgekd.errors import InputError
from edgekd.models.dict_model import DictModel

QatRuntime = Literal["cpu", "tensorrt"]

aten = torch.ops.aten


def check_torchao() -> None:
    """Check that torchao is installed.

    Raises:
        InputError: it is not installed.
    """
    if find_spec("torchao") is None:
        raise InputError(
            "quantization-aware training needs torchao, which is not installed",
            where="quantize.int8",
            remedy="pip install 'edgekd[qat]', or set int8: static",
        )


def build_quantizer(runtime: QatRuntime, reduce_range: bool = False) -> Any:
    """The torchao quantizer: which tensors are rounded, and how.

    Weights of convolutions and linear layers: int8 from −127 to 127, symmetric, with a scale for
    each output channel that is recomputed with the weights. Inputs of these layers: for
    TensorRT int8 from −128 to 127, symmetric, because it has no zero points; for the CPU uint8 from
    0 to 255 with a zero point; one scale per tensor, from a moving average of the extremes of the
    batches. Biases stay float32. With ``reduce_range`` weights range from −63 to 63: where products
    of two bytes are summed in 16 bits (x86 without VNNI), larger ones overflow.

    Not torchao's fused fake quantization: where a tensor has no negative value (after a ReLU) it
    trains with a zero point although a symmetric scheme was set, and conversion then
    doubles the step.

    Returns:
        A torchao quantizer for ``prepare_qat_pt2e``.
    """
    with silence():
        from torchao.quantization.pt2e import (
            FakeQuantize,
            MovingAverageMinMaxObserver,
            MovingAveragePerChannelMinMaxObserver,
        )
        from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
        )
    symmetric = runtime == "tensorrt"
    largest = 63 if reduce_range else 127
    activations = QuantizationSpec(
        dtype=torch.int8 if symmetric else torch.uint8,
        quant_min=-128 if symmetric else 0,
        quant_max=127 if symmetric else 255,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-largest,
        quant_max=largest,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0
        ),
    )
    config = QuantizationConfig(activations, activations, weights, None, is_qat=True)
    quantizer = X86InductorQuantizer().set_global(config)
    if runtime == "cpu":
        annotate = quantizer.annotate

        def with_summands(graph: GraphModule) -> GraphModule:
            annotate(graph)
            _round_summands(graph, activations)
            return graph

        quantizer.annotate = with_summands
    return quantizer


def _round_summands(graph: GraphModule, activations: Any) -> None:
    """Round a convolution's output before an addition, as ONNX Runtime's integer convolution does.

    TensorRT adds in the convolution itself, before it rounds.
    """
    for node in graph.graph.nodes:
        if node.target not in (aten.conv2d.default, aten.batch_norm.default):
            continue
        adds = any(user.target in (aten.add.Tensor, aten.add_.Tensor) for user in node.users)
        annotation = node.meta.get("quantization_annotation")
        if adds and annotation is not None and annotation.output_qspec is None:
            annotation.output_qspec = activations


@contextlib.contextmanager
def functional_relu() -> Iterator[None]:
    """Let torchao see ``F.relu`` too: torch.export without dynamo only leaves its name."""
    with silence():
        from torchao.quantization.pt2e import get_equivalent_types, update_equivalent_types_dict
    before = get_equivalent_types()
    names = {"relu", "relu_"}
    update_equivalent_types_dict([s | names if torch.nn.ReLU in s else s for s in before])
    try:
        yield
    finally:
        update_equivalent_types_dict(before)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Silence torchao's warnings and logs, and torch's about it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def batch_norms(graph: GraphModule) -> dict[str, tuple[float, float]]:
    """The momentum and ε of each batch norm, by the path of its running variance."""
    return {
        str(node.args[4].target): (node.args[6], node.args[7])
        for node in graph.graph.nodes
        if node.target is aten.batch_norm.default and isinstance(node.args[4], Node)
    }


def restore_batch_norms(graph: GraphModule, settings: Mapping[str, tuple[float, float]]) -> None:
    """Restore the batch norms' own settings, and remove the batch counters."""
    for node in list(graph.graph.nodes):
        if node.target is aten.batch_norm.default and isinstance(node.args[4], Node):
            momentum, epsilon = settings[str(node.args[4].target)]
            node.update_arg(6, momentum)
            node.update_arg(7, epsilon)
            if isinstance(node.args[1], Node):
                # The convolution's output is divided by γ/σ in training: 0/0 otherwise.
                gamma = _attribute(graph, node.args[1])
                with torch.no_grad():
                    gamma[gamma == 0] = 1e-6
        elif node.target is aten.add.Tensor and _path(node.args[0]) in settings:
            node.update_arg(1, settings[_path(node.args[0])][1])
        elif node.target is aten.add_.Tensor and _path(node.args[0]).endswith(
            "num_batches_tracked"
        ):
            graph.graph.erase_node(node)
    graph.recompile()


def fold_batch_norms(graph: GraphModule) -> None:
    """Fold the batch norms that torchao fused with the convolutions before them.

    They are in the graph as y = bn(conv(x, q(w·γ/σ)) / (γ/σ) [+ b]), σ = √(v + ε), and become
    conv(x, q(w·γ/σ)) + β + ([b] − μ)·γ/σ. torchao's own conversion takes half a minute for
    this, because it tries every kind of convolution, and assumes an ε of 10⁻⁵.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.batch_norm.default:
            continue
        divided, own_bias = node.args[0], None
        if divided.target is aten.add.Tensor:
            divided, own_bias = divided.args[0], divided.args[1].args[0]
        if divided.target is not aten.div.Tensor or _path(divided.args[1].args[0]):
            continue
        convolution, factor_node = divided.args[0], divided.args[1].args[0]
        rounded = convolution.args[1]
        scaled = rounded.args[0] if rounded.op == "call_module" else rounded
        if factor_node.target is not aten.div.Tensor or scaled.target is not aten.mul.Tensor:
            continue
        with torch.no_grad():
            gamma, beta, mean, variance = (_attribute(graph, n) for n in node.args[1:5])
            factor = gamma / torch.sqrt(variance + node.args[7])
            weight = _attribute(graph, scaled.args[0]) * factor.reshape(scaled.args[1].args[1])
            offset = -mean if own_bias is None else _attribute(graph, own_bias) - mean
            bias = beta + offset * factor
        name = str(node.name)
        with graph.graph.inserting_before(convolution):
            folded = [
                graph.graph.get_attr(_keep(graph, f"{name}_{key}", value))
                for key, value in (("weight", weight), ("bias", bias))
            ]
        if rounded is scaled:
            convolution.update_arg(1, folded[0])
        else:
            with graph.graph.inserting_before(rounded):
                before = graph.graph.get_attr(f"{name}_weight")
            rounded.update_arg(0, before)
        convolution.args = (*convolution.args[:2], folded[1], *convolution.args[3:])
        node.replace_all_uses_with(convolution)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _keep(graph: GraphModule, name: str, value: Tensor) -> str:
    graph.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return name


def _path(node: object) -> str:
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else ""


def _attribute(graph: GraphModule, node: Node) -> Tensor:
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor)
    return value


def computed_weights(model: nn.Module) -> tuple[str, ...]:
    """The tensors that a weight norm, a spectral norm or another parametrization computes."""
    found = []
    for name, module in model.named_modules():
        prefix = f"{name.removeprefix('module.')}." if name else ""
        if parametrize.is_parametrized(module):
            found += [prefix + tensor for tensor in cast(nn.ModuleDict, module.parametrizations)]
        found += [prefix + hook.name for hook in _norm_hooks(module)]
    return tuple(found)


def with_plain_weights(model: DictModel) -> DictModel:
    """A copy whose :func:`computed_weights` are replaced by their values: plain parameters.

    Its outputs are the same. In further training its weights are unconstrained, as in the export.
    """
    for module in model.modules():
        for hook in _norm_hooks(module):
            # Recomputed in each forward pass; with its graph it could not be copied.
            setattr(module, hook.name, getattr(module, hook.name).detach())
    copied = copy.deepcopy(model).eval()
    for module in copied.modules():
        for hook in _norm_hooks(module):
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
            else:
                nn.utils.remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module):
            _make_plain(module)
    copied.train(model.training)
    return copied


def _make_plain(module: nn.Module) -> None:
    """Replace a copied module's parametrizations by their values.

    Not by torch's ``remove_parametrizations``: a copy shares its class, and with it the computed
    properties, with the module that it was copied from.
    """
    names = list(cast(nn.ModuleDict, module.parametrizations))
    values = {name: getattr(module, name).detach().clone() for name in names}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _norm_hooks(module: nn.Module) -> list[Any]:
    """The norms of torch before parametrizations, which compute a weight before each forward."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)]


_WEIGHTED = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip


def check_plain_weights(graph: GraphModule) -> None:
    """Refuse a weight that forward computes: torchao would fail on it after the training.

    Raises:
        InputError: there is one; its layer is named.
    """
    for node in graph.graph.nodes:
        if node.target not in _WEIGHTED or node.args[1].op == "get_attr":
            continue
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        inside = [path.partition("module.")[2] for path in stack]
        layer = next((path for path in reversed(inside) if path), node.name)
        raise InputError(
            f"the weight of {layer!r} is computed in forward ({node.args[1].target}), and only a "
            "weight that is a parameter can be rounded in training",
            where="quantize.int8",
            remedy="make it a parameter before (torch.nn.utils.parametrize."
            "remove_parametrizations, remove_weight_norm), or set int8: static",
        )
