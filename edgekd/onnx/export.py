"""Export a torch module with named inputs and outputs to an ONNX file, by torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgekd.errors import StageError
from edgekd.files import write_errors
from edgekd.onnx.file import describe_onnx
from edgekd.onnx.graph import all_graphs, opset_of
from edgekd.onnx.optimizer_faults import guard_padding
from edgekd.onnx.session import first_line
from edgekd.spec import ModelSpec, TensorSpec

DEFAULT_OPSET = 18


def export_onnx(
    model: SpecModule,
    path: Path,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as one ONNX file with its weights inside.

    Inputs and outputs have the names, order and dtypes of ``model.spec``; every symbolic
    dimension of an input (``batch``) stays dynamic under its name. The file passes ONNX's full
    check. Nodes carry no stack traces, so the file contains nothing about the machine it was made
    on.

    Args:
        model: a module with ``spec`` with mappings as input and output; exported in eval mode.
        path: where to write.
        opset: the ONNX opset.
        metadata: written to the file's metadata.

    Raises:
        StageError: the exporter cannot express the model, fixes the batch dimension, gives
            another signature than the specification, or the file cannot be written.
    """
    where = f"export of {path.name}"
    proto = to_onnx_proto(model, opset, where)
    _bare(proto)
    _rename_dimensions(proto, model.spec, where)
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(
            f"the exported graph breaks ONNX's rules: {first_line(error)}",
            where=where,
            remedy=f"try another opset (export: {{opset: …}}); this was {opset}",
        ) from error
    _check_opset(proto, opset, where)
    try:
        with write_errors(path, "the ONNX file"):
            path.write_bytes(proto.SerializeToString())
    except ValueError as error:
        raise StageError(
            f"the model does not fit in one ONNX file: {first_line(error)}",
            where=where,
            remedy="one file holds at most 2 GB of weights; export a smaller model",
        ) from error
    _check_signature(describe_onnx(path).spec, model.spec, where)


def export_to_count(model: SpecModule, path: Path, batch: int) -> bool:
    """Write a model's graph for one batch size by torch's older exporter, for counting its costs.

    It takes a tenth of the time of :func:`export_onnx`, and gives the same layers; the file is not
    one to ship.

    Returns:
        False where this exporter cannot express the model, or a size besides the batch is open.
    """
    open_sizes = {size for each in model.spec.inputs for size in each.shape[1:]}
    if any(isinstance(size, str) for size in open_sizes):
        return False
    module = cast(nn.Module, model)
    examples = tuple(
        torch.from_numpy(np.zeros((batch, *each.shape[1:]), dtype=each.dtype))
        for each in model.spec.inputs
    )
    training = module.training
    try:
        with _silence():
            torch.onnx.export(
                Positional(model).eval(),
                examples,
                str(path),
                dynamo=False,
                opset_version=DEFAULT_OPSET,
                input_names=[each.name for each in model.spec.inputs],
                output_names=[each.name for each in model.spec.outputs],
            )
    except Exception:  # It raises many kinds; the other exporter then says what is wrong.
        return False
    finally:
        module.train(training)
    return True


def _bare(proto: onnx.ModelProto) -> None:
    """Remove the exporter's metadata about its machine: stack traces, paths, class names."""
    proto.doc_string = ""
    parts: list[Any] = []
    for graph in all_graphs(proto.graph):
        parts += [graph, *graph.node, *graph.value_info, *graph.input, *graph.output]
        parts += graph.initializer
    for function in proto.functions:
        parts += [function, *function.node]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]


def _rename_dimensions(proto: onnx.ModelProto, spec: ModelSpec, where: str) -> None:
    """Give symbolic dimensions the specification's names; a fixed one is an error."""
    renamed: dict[str, str] = {}
    for values, tensors in ((proto.graph.input, spec.inputs), (proto.graph.output, spec.outputs)):
        if len(values) != len(tensors):
            continue  # reported with the names by _check_signature
        for value, tensor in zip(values, tensors, strict=True):
            dimensions = value.type.tensor_type.shape.dim
            if len(dimensions) != len(tensor.shape):
                continue
            for axis, (dimension, wanted) in enumerate(zip(dimensions, tensor.shape, strict=True)):
                if not isinstance(wanted, str):
                    continue
                if dimension.HasField("dim_value"):
                    raise StageError(
                        f"dimension {axis} ({wanted!r}) of {value.name!r} became the fixed number "
                        f"{dimension.dim_value}",
                        where=where,
                        remedy="the model's forward uses a size as a Python number; take it from "
                        "x.shape[0] where it is used, or use -1 in reshape",
                    )
                if dimension.dim_param and dimension.dim_param != wanted:
                    renamed[dimension.dim_param] = wanted
                dimension.dim_param = wanted
    for value in proto.graph.value_info:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in renamed:
                dimension.dim_param = renamed[dimension.dim_param]


def _check_opset(proto: onnx.ModelProto, opset: int, where: str) -> None:
    written = opset_of(proto)
    if written != opset:
        raise StageError(
            f"the exporter wrote opset {written} where {opset} was requested",
            where=where,
            remedy=f"set export: {{opset: {written}}}: it has no conversion of this model",
        )


def _check_signature(found: ModelSpec, wanted: ModelSpec, where: str) -> None:
    for kind, have, want in (
        ("inputs", found.inputs, wanted.inputs),
        ("outputs", found.outputs, wanted.outputs),
    ):
        if _signature(have) != _signature(want):
            raise StageError(
                f"the exported {kind} are {', '.join(map(str, have)) or 'none'}, "
                f"the model's are {', '.join(map(str, want))}",
                where=where,
                remedy="an input that forward does not use is dropped by the exporter: use it or "
                "leave it out of the data"
                if kind == "inputs"
                else "check the model's outputs",
            )


def _signature(tensors: tuple[TensorSpec, ...]) -> list[tuple[str, tuple[int | str, ...], str]]:
    return [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]


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
        outputs = self.model(dict(zip(self.names, tensors, strict=True)))
        return tuple(outputs[name] for name in self.outputs)


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
