"""Why a layer's channels cannot be followed: the operators after it, or a gradient that ends."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.models.build import example_batch
from edgekd.models.dict_model import DictModel

_FOLLOWED = re.compile(
    "Accumulate|Add|Addmm|AddBmm|AsStrided|AdaptiveAvgPool2D|AvgPool2D|Bmm|Clamp|Clone|Convolution|"
    "Div|Dropout|Elu|Gelu|Hardsigmoid|Hardswish|Hardtanh|LeakyRelu|MaxPool2DWithIndices|Mean|"
    "MkldnnConvolution|Mm|Mul|NativeBatchNorm|NativeDropout|NativeGroupNorm|NativeLayerNorm|"
    "Permute|Relu|Reshape|Sigmoid|Silu|Softmax|Sub|Sum|T|Tanh|ToCopy|Transpose|UnsafeView|View"
)
"""Operators of autograd that change no channel's place, or that the dependency graph knows."""


@dataclass(frozen=True)
class _Called:
    """A layer's call: whether gradients were on, and the autograd nodes around it."""

    name: str
    grad: bool
    reached: bool
    """Whether its input has a gradient."""
    node: Any


def explain(model: DictModel) -> tuple[dict[str, str], dict[str, str]]:
    """What keeps the channels of a layer with weights from being followed, by its name.

    Every parameter must require gradients.

    Returns:
        Why layers cannot be pruned at all: their kind, or where the gradient from the outputs ends;
        and for others the unusual operators between them and the next layers, such as ``sort``.
    """
    left: dict[str, str] = {}
    called: list[_Called] = []
    handles = []
    for name, layer in model.module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule | nn.RNNBase):
            kind = "a TorchScript module" if not isinstance(layer, nn.RNNBase) else layer.mode
            left[name] = f"{kind} is not pruned"
        elif any(p.ndim > 1 for p in layer.parameters(recurse=False)):
            handles.append(layer.register_forward_hook(_record(name, called)))
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            outputs = model(example_batch(model.spec.inputs)).values()
    finally:
        for handle in handles:
            handle.remove()
    ends = {output.grad_fn for output in outputs} - {None}
    uses, nodes = _uses(list(ends)), {one.node for one in called}
    operators = {}
    for number, one in enumerate(called):
        if one.node is not None and (one.node in uses or one.node in ends):
            if after := sorted(set(_operators(one.node, uses, nodes))):
                operators[one.name] = ", ".join(after)
        elif not one.grad:
            left[one.name] = "no gradient reaches the outputs: it is called under torch.no_grad()"
        else:
            cut = next((later.name for later in called[number + 1 :] if not later.reached), None)
            place = f"before {cut}" if cut else "before the outputs"
            left[one.name] = f"no gradient reaches the outputs: it is detached {place}"
    return left, operators


def failing_line(error: BaseException) -> str:
    """The user's own line in which a network failed: ``mine.py:12: x = x.numpy()``; else empty."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        inside = {"site-packages", "edgekd"} & set(path.parts) or frame.filename.startswith("<")
        if not inside:
            return f" ({path.name}:{frame.lineno}: {frame.line})"
    return ""


def _record(name: str, called: list[_Called]) -> Any:
    def hook(layer: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        given = next((value for value in args if isinstance(value, Tensor)), None)
        reached = given is None or given.requires_grad or not called
        node = first.grad_fn if isinstance(first, Tensor) else None
        called.append(_Called(name, torch.is_grad_enabled(), reached, node))

    return hook


def _uses(ends: list[Any]) -> dict[Any, list[Any]]:
    """By each autograd node the nodes that read it."""
    uses: dict[Any, list[Any]] = {}
    waiting, seen = list(ends), set(ends)
    while waiting:
        node = waiting.pop()
        for before, _ in node.next_functions:
            if before is None:
                continue
            uses.setdefault(before, []).append(node)
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return uses


def _operators(node: Any, uses: dict[Any, list[Any]], layers: set[Any]) -> Iterator[str]:
    """The unusual operators between a layer and the next ones."""
    waiting, seen = list(uses.get(node, ())), set()
    while waiting:
        after = waiting.pop()
        if after in layers or after in seen:
            continue
        seen.add(after)
        name = after.name().rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")
        if not _FOLLOWED.fullmatch(name):
            yield name.lower()
        waiting += uses.get(after, ())
