"""A network as a graph with fake quantization, trainable like any other model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgekd.distill.qat_quantizer import (
    QatRuntime,
    batch_norms,
    build_quantizer,
    fold_batch_norms,
    functional_relu,
    restore_batch_norms,
    silence,
)
from edgekd.errors import InputError, StageError
from edgekd.models.dict_model import DictModel
from edgekd.spec import ModelSpec

FROZEN_FROM = 2 / 3
"""The part of the training after which batch-norm statistics and the ranges of activations are
frozen: the weights then converge on the quantization grid that is shipped."""

_EXAMPLE_BATCH = 2
_SAME = 1e-3
"""Largest difference of the graph to the network without rounding, relative to the largest output:
float32 noise of another order of operations; a wrongly traced layer differs by far more."""

aten = torch.ops.aten


class PreparedStudent(DictModel):
    """A network whose weights and activations are rounded as int8 ones, in float32.

    It has its own copy of the weights. Layers cannot be captured in it: it is one graph.

    Args:
        model: the float32 network; it is not changed.
        runtime: the runtime of the result; decides the rounding.
        reduce_range: weights of 7 bits; see :func:`.fake_quantize_spec.build_quantizer`.

    Raises:
        InputError: nothing in it can be quantized, or it behaves in training in a
            way that a graph cannot follow.
        StageError: torch cannot trace it, or torchao cannot prepare it.
    """

    def __init__(self, model: DictModel, runtime: QatRuntime, reduce_range: bool = False) -> None:
        super().__init__(_Graph(_prepare(model, runtime, reduce_range)), model.spec)
        self._check_against(model)

    def on_progress(self, part: float) -> None:
        """Called before each step with the share of the training that is done, 0 to 1."""
        self._graph.freeze(part >= FROZEN_FROM)

    def convert(self) -> DictModel:
        """The network with real int8 weights and rounding, for export; this one is unchanged.

        Batch norms are folded into the convolutions before them.
        """
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        self.eval()
        with torch.no_grad():
            # The ranges of the weights follow them in a forward pass.
            self(examples(self.spec, self._device()))
        graph = copy.deepcopy(self._graph).graph
        fold_batch_norms(graph)
        with silence():
            return DictModel(_Converted(convert_pt2e(graph)), self.spec)

    @property
    def _graph(self) -> _Graph:
        assert isinstance(self.module, _Graph)
        return self.module

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _check_against(self, model: DictModel) -> None:
        """Compare with the network, both in evaluation and without rounding."""
        batch = examples(self.spec, self._device())
        rounding = self._graph.rounding
        if not rounding:
            raise InputError(
                "the network has no convolution or linear layer that can be quantized",
                where="student",
                remedy="set int8: dynamic or weights-only, or leave int8 out",
            )
        training = model.training
        model.eval()
        self.eval()
        with torch.no_grad():
            expected = model(batch)
            for module in rounding:
                module.disable_fake_quant()
            found = self(batch)
            for module in rounding:
                module.enable_fake_quant()
        model.train(training)
        for name, tensor in expected.items():
            limit = _SAME * max(float(tensor.abs().max()), 1e-6)
            if not bool(((found[name] - tensor).abs() <= limit).all()):
                raise InputError(
                    f"the graph of the network does not reproduce its outputs: {name!r} differs by "
                    f"{float((found[name] - tensor).abs().max()):.3g}",
                    where="student",
                    remedy="a layer behaves otherwise in training and in evaluation, and is "
                    "neither torch's dropout nor its batch norm; set int8: static",
                )


def examples(spec: ModelSpec, device: torch.device) -> dict[str, Tensor]:
    """A batch of the inputs: noise, and zeros for integers, which are a valid index of any
    table.
    """
    draw = torch.Generator().manual_seed(0)
    batch = {}
    for tensor in spec.inputs:
        shape = [_EXAMPLE_BATCH if isinstance(size, str) else size for size in tensor.shape]
        dtype: torch.dtype = getattr(torch, tensor.dtype)
        noise = torch.randn(shape, generator=draw)
        batch[tensor.name] = (noise if dtype.is_floating_point else torch.zeros(shape)).to(
            device, dtype
        )
    return batch


class _Graph(nn.Module):
    """The prepared graph; training and evaluation are switched in its nodes.

    torchao's own switch is not used: it gives every batch norm the usual ε and momentum.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph
        self.frozen = False

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name to outputs by name."""
        answers: dict[str, Tensor] = self.graph(batch)
        return answers

    def train(self, mode: bool = True) -> _Graph:
        """Switch dropout, batch norm and the observation of ranges."""
        self.training = mode
        self._switch()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Graph:
        # torch warns about its own code when it copies a graph.
        with silence():
            copied = _Graph(copy.deepcopy(self.graph, memo))
        copied.training, copied.frozen = self.training, self.frozen
        return copied

    def freeze(self, frozen: bool) -> None:
        """Freeze (or unfreeze) the batch statistics in training."""
        if frozen != self.frozen:
            self.frozen = frozen
            self._switch()

    @property
    def rounding(self) -> list[Any]:
        """The fake quantizations."""
        return [m for m in self.graph.modules() if hasattr(m, "fake_quant_enabled")]

    def _switch(self) -> None:
        follows = self.training and not self.frozen
        changed = False
        for node in self.graph.graph.nodes:
            position = _TRAINING_AT.get(node.target)
            if position is None:
                continue
            mode = follows if node.target is aten.batch_norm.default else self.training
            if node.args[position] is not mode:
                node.update_arg(position, mode)
                changed = True
        if changed:
            self.graph.recompile()
        for module in self.rounding:
            if not module.is_per_channel:
                module.enable_observer(follows)
                if not follows:
                    _set_step(module)


_TRAINING_AT: dict[Any, int] = {
    aten.batch_norm.default: 5,
    aten.dropout.default: 2,
    aten.dropout_.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
}
"""Operators that behave differently in training, and the position of the argument for it."""


class _Converted(nn.Module):
    """The converted graph, which has no training mode."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name to outputs by name."""
        answers: dict[str, Tensor] = self.graph(batch)
        return answers

    def train(self, mode: bool = True) -> _Converted:
        """Nothing changes: torchao's graph raises on train() and eval()."""
        self.training = mode
        return self


def _set_step(module: Any) -> None:
    """The scale and zero point of the range observed so far: an average of weights averages them,
    and the conversion recomputes them."""
    observer = module.activation_post_process
    if bool(torch.isfinite(observer.min_val).all()) and observer.min_val.numel():
        scale, zero_point = module.calculate_qparams()
        module.scale.copy_(scale)
        module.zero_point.copy_(zero_point)


def _prepare(model: DictModel, runtime: QatRuntime, reduce_range: bool) -> GraphModule:
    quantizer = build_quantizer(runtime, reduce_range)
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    network = with_plain_weights(model)
    # The pass that fuses a convolution and its batch norm expects them in training mode.
    network.train()
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    symbols = {
        size: torch.export.Dim(size)
        for tensor in model.spec.inputs
        for size in tensor.shape
        if isinstance(size, str)
    }
    shapes = {
        tensor.name: {
            axis: symbols[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)
        }
        for tensor in model.spec.inputs
    }
    try:
        with silence():
            program = torch.export.export(
                network, (examples(model.spec, device),), dynamic_shapes=(shapes,)
            )
            graph = program.module(check_guards=False)
            assert isinstance(graph, GraphModule)
            _check_weights(graph)
            settings = batch_norms(graph)
            with functional_relu():
                prepared: GraphModule = prepare_qat_pt2e(graph, quantizer)
    except InputError:
        raise
    except Exception as error:
        # Both raise many kinds of error.
        first = next(iter(str(error).strip().splitlines()), "")
        raise StageError(
            f"the network cannot be prepared for quantization-aware training: "
            f"{type(error).__name__}: {first}",
            where="quantize.int8",
            remedy="write forward without branches on tensor values and without fixed batch "
            "sizes, or set int8: static",
        ) from error
    restore_batch_norms(prepared, settings)
    return prepared


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


def _check_weights(graph: GraphModule) -> None:
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
