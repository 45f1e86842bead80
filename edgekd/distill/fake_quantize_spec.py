"""How tensors are rounded to 8 bits in quantization-aware training, by the runtime that follows.

torchao is imported when it is needed: it is an extra, and importing it takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from edgekd.errors import InputError

Runtime = Literal["cpu", "tensorrt"]

aten = torch.ops.aten


def check_torchao() -> None:
    """See that torchao is there.

    Raises:
        InputError: it is not installed.
    """
    if find_spec("torchao") is None:
        raise InputError(
            "quantization-aware training needs torchao, which is not installed",
            where="quantize.int8",
            remedy="pip install 'edgekd[qat]', or set int8: static",
        )


def build_quantizer(runtime: Runtime, reduce_range: bool = False) -> Any:
    """What tells torchao which tensors are rounded, and how.

    Weights of convolutions and linear layers: int8 from −127 to 127, symmetric, with a scale for
    each output channel that follows the weights at once. What goes into these layers: for
    TensorRT int8 from −128 to 127, symmetric, for it has no zero points; for the CPU uint8 from
    0 to 255 with a zero point; one scale per tensor, from a moving average of the extremes of the
    batches. Biases stay float32. With ``reduce_range`` weights go from −63 to 63: where products of
    two bytes are summed in 16 bits (x86 without VNNI), larger ones overflow.

    Not torchao's fused fake quantization: where a tensor has no negative value (after a ReLU) it
    trains with a zero point although a symmetric scheme was asked for, and conversion then
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
    """Round what a convolution gives to a sum, as ONNX Runtime's integer convolution does.

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
    """Nothing of torchao's warnings and logs, nor of torch's about it, reaches the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
