"""Quantization-aware distillation: training continued with simulated 8-bit rounding.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; by torchao's pt2e flow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edgekd.config.host import world_size
from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill.checkpoint import History
from edgekd.distill.qat_graph import (
    QatRuntime,
    batch_norms,
    build_quantizer,
    check_plain_weights,
    check_torchao,
    fold_batch_norms,
    functional_relu,
    restore_batch_norms,
    silence,
    with_plain_weights,
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


@dataclass(frozen=True)
class QatResult:
    """The result of quantization-aware training.

    Attributes:
        history: the history of its training.
        prepared: the trained network that rounds in float32; in evaluation it has the outputs
            of ``model``, but for float32 noise at the edges between two steps.
        model: the network with int8 weights, to be exported as any other.
    """

    history: History
    prepared: PreparedStudent
    model: DictModel


def quantization_aware(
    model: DictModel,
    runtime: QatRuntime,
    fit: Callable[[nn.Module], History],
    reduce_range: bool = False,
) -> QatResult:
    """Continue the training of a float32 network with simulated int8 rounding, and convert it.

    Args:
        model: trained; it is not changed.
        runtime: ``tensorrt`` rounds activations to symmetric int8, ``cpu`` to uint8 with a zero
            point; weights are int8 per output channel for both.
        fit: the training loop; it trains its argument in place, which takes and returns
            mappings as ``model`` does.
        reduce_range: weights of 7 bits, for processors that would overflow otherwise.

    Raises:
        InputError: torchao is missing, several processes train together, or the network has
            nothing to quantize or does not fit in a graph.
        StageError: torch cannot trace the network.
    """
    check_torchao()
    if world_size() > 1:
        raise InputError(
            "quantization-aware training is for one process: the ranges of activations are not "
            "shared between several",
            where="quantize.int8",
            remedy="start one process, or set int8: static",
        )
    prepared = PreparedStudent(model, runtime, reduce_range)
    history = fit(prepared)
    return QatResult(history, prepared, prepared.convert())


def check_training(config: TrainConfig, where: str = "quantize.qat") -> None:
    """Refuse what a graph with fake quantization cannot be trained with.

    Raises:
        InputError: half precision, or a compiled network.
    """
    if config.precision != "float32":
        raise InputError(
            f"8-bit rounding is simulated in float32, and {config.precision} is requested",
            where=f"{where}.precision",
            remedy="set precision: float32",
        )
    if config.compile:
        raise InputError(
            "the graph is switched in the middle of the training, which a compiled one is not",
            where=f"{where}.compile",
            remedy="set compile: false",
        )


def terms_of_outputs(
    terms: Sequence[LossTerm], own: Sequence[LossTerm] | None
) -> tuple[tuple[LossTerm, ...], tuple[str, ...]]:
    """The loss terms of the training, and the names of those that are left out.

    Args:
        terms: those of the distillation; terms that name layers of the student are left out,
            because the prepared graph does not have them.
        own: the explicitly configured ones (``quantize.qat.losses``), if any.

    Raises:
        InputError: none is left, or one of ``own`` names layers of the student.
    """
    if own is not None:
        for index, term in enumerate(own):
            if term.args.get("student") is not None:
                raise InputError(
                    f"{term.name!r} compares the student's layers {term.args['student']}, and "
                    "the graph that is trained for int8 has no layers",
                    where=f"quantize.qat.losses[{index}].{term.name}",
                    remedy="use losses on the outputs",
                )
        return tuple(own), ()
    used = tuple(term for term in terms if term.args.get("student") is None)
    left_out = tuple(term.name for term in terms if term not in used)
    if not any(term.weight for term in used):
        raise InputError(
            f"all losses compare layers of the student ({', '.join(left_out)}), and the graph "
            "that is trained for int8 has no layers",
            where="distill.losses",
            remedy="name losses on the outputs (quantize.qat.losses), or set int8: static",
        )
    return used, left_out


class PreparedStudent(DictModel):
    """A network whose weights and activations are rounded as int8 ones, in float32.

    It has its own copy of the weights. Layers cannot be captured in it: it is one graph.

    Args:
        model: the float32 network; it is not changed.
        runtime: the runtime of the result; decides the rounding.
        reduce_range: weights of 7 bits; see :func:`edgekd.distill.qat_graph.build_quantizer`.

    Raises:
        InputError: nothing in it can be quantized, or it behaves in training in a
            way that a graph cannot follow.
        StageError: torch cannot trace it, or torchao cannot prepare it.
    """

    def __init__(self, model: DictModel, runtime: QatRuntime, reduce_range: bool = False) -> None:
        super().__init__(_Graph(_prepare(model, runtime, reduce_range)), model.spec)
        self._check_against(model)

    def on_progress(self, progress: float) -> None:
        """Called before each step with the share of the training that is done, 0 to 1."""
        self._graph.freeze(progress >= FROZEN_FROM)

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
        outputs: dict[str, Tensor] = self.graph(batch)
        return outputs

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
        outputs: dict[str, Tensor] = self.graph(batch)
        return outputs

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
            check_plain_weights(graph)
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
