"""From a torch module to an ONNX graph in memory, by torch's dynamo exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgekd.errors import StageError
from edgekd.onnx.optimizer_faults import guard_padding
from edgekd.onnx.session import first_line
from edgekd.spec import ModelSpec, TensorSpec

EXAMPLE_BATCH = 2
"""Size of symbolic dimensions while tracing: 0 and 1 are special cases to torch.export."""

_NOISY_LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch.fx",
    "onnxscript",
    "onnx_ir",
    "torch._dynamo",
)


class SpecModule(Protocol):
    """A module with named inputs and outputs, as ``edgekd.models`` builds them."""

    spec: ModelSpec

    def __call__(self, batch: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """From inputs by name to outputs by name."""
        ...


class Positional(nn.Module):
    """The same model taking its inputs by position and giving a tuple, in the spec's order."""

    def __init__(self, model: SpecModule) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(tensor.name for tensor in model.spec.inputs)
        self.outputs = tuple(tensor.name for tensor in model.spec.outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Positional inputs and outputs, in the order of the specification."""
        answers = self.model(dict(zip(self.names, tensors, strict=True)))
        return tuple(answers[name] for name in self.outputs)


def to_onnx_proto(model: SpecModule, opset: int, where: str) -> onnx.ModelProto:
    """Trace a model in eval mode into an ONNX graph with dynamic symbolic dimensions.

    Raises:
        StageError: the exporter cannot trace or express the model; its cause is named.
    """
    module = cast(nn.Module, model)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    symbols = {
        size: torch.export.Dim(size)
        for tensor in model.spec.inputs
        for size in tensor.shape
        if isinstance(size, str)
    }
    shapes = tuple(
        {axis: symbols[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in model.spec.inputs
    )
    examples = tuple(_example(tensor).to(device) for tensor in model.spec.inputs)
    training = module.training
    module.eval()
    try:
        with _silence():
            program = torch.onnx.export(
                Positional(model).eval(),
                examples,
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in model.spec.inputs],
                output_names=[tensor.name for tensor in model.spec.outputs],
                # One entry: the wrapper's only parameter is *tensors.
                dynamic_shapes=(shapes,),
                external_data=False,
                verbose=False,
            )
            proto = program.model_proto if program is not None else None
    except Exception as error:
        # The exporter raises many kinds of error, and wraps a user's own error raised in forward.
        raise StageError(
            f"torch cannot export the model: {_cause(error)}",
            where=where,
            remedy="write forward without branches on tensor values and without fixed batch "
            "sizes; 'torch.export.export(model, …)' alone shows the complete error",
        ) from error
    finally:
        module.train(training)
    if proto is None:
        raise StageError("torch's exporter returned nothing", where=where, remedy="update torch")
    guard_padding(proto)
    return proto


def _example(tensor: TensorSpec) -> Tensor:
    shape = tuple(EXAMPLE_BATCH if isinstance(size, str) else size for size in tensor.shape)
    # Zeros: the tracer does not look at values, and 0 is a valid index of any embedding.
    return torch.from_numpy(np.zeros(shape, dtype=tensor.dtype))


def _cause(error: BaseException) -> str:
    """The innermost cause's first line: the exporter's own message is a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing of the exporter's progress, warnings and logs reaches the user's terminal."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
