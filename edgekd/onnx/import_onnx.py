"""Import a user's ONNX file: one file, the pipeline's names and classes, the same outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from google.protobuf.message import EncodeError

from edgekd.errors import InputError
from edgekd.models.adapted import Adaptation, InputAdaptation
from edgekd.onnx.file import check_onnx
from edgekd.onnx.graph import opset_of
from edgekd.onnx.session import first_line
from edgekd.spec import ModelSpec, TensorSpec


def pack_onnx(source: Path, destination: Path) -> None:
    """Copy a model into one file, with its external data inside (PyTorch's exporter writes separate
    files).

    Raises:
        InputError: as :func:`edgekd.onnx.export.check_onnx`, or the result is above protobuf's
            2 GB.
    """
    check_onnx(source)
    try:
        onnx.save(onnx.load(str(source)), str(destination))
    except (ValueError, EncodeError) as error:
        raise InputError(
            f"the model does not fit into one file: {first_line(error)}",
            where=str(source),
            remedy="ONNX files can have at most 2 GB; give a smaller model",
        ) from error


def rename_onnx(path: Path, names: Mapping[str, str]) -> None:
    """Give inputs and outputs of a file other names, in place.

    Args:
        path: a model in one file.
        names: the new names by the old; unchanged names may be left out.
    """
    changed = {old: new for old, new in names.items() if old != new}
    if not changed:
        return
    model = onnx_ir.load(path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in changed:
            value.name = changed[value.name]
    # Serialized completely before the file that the weights are read from is replaced.
    content = onnx_ir.to_proto(model).SerializeToString()
    path.write_bytes(content)


_RESIZE_OPSET = 11
"""From where on Resize can place pixels as torch does."""


def adapt_onnx(path: Path, adaptation: Adaptation, spec: ModelSpec) -> None:
    """Put a teacher's preprocessing and the order of its outputs into its file, in place.

    The file then takes the pipeline's samples and outputs the data's classes in order; its
    output form is unchanged (probabilities remain probabilities).

    Args:
        path: a model in one file, with the pipeline's names.
        adaptation: the preprocessing and output conversion between the data and the file.
        spec: the pipeline's inputs and outputs.

    Raises:
        InputError: the file's opset cannot resize.
    """
    if adaptation.input is None and adaptation.order is None:
        return
    model = onnx.load(str(path))
    if adaptation.input is not None:
        given = next(s for s in spec.inputs if s.name == adaptation.input.name)
        _prepend(model, adaptation.input, given, path)
    if adaptation.order is not None:
        _reorder(model.graph, adaptation)
    onnx.save(model, str(path))


def _prepend(
    model: onnx.ModelProto, adaptation: InputAdaptation, given: TensorSpec, path: Path
) -> None:
    graph, config, image = model.graph, adaptation.config, len(given.shape) == 4
    value = next(v for v in graph.input if v.name == given.name)
    inner = f"{given.name}/adapted"
    for node in graph.node:
        node.input[:] = [inner if name == given.name else name for name in node.input]
    steps = _Steps(graph, given.name, value.type.tensor_type.elem_type, 4 if image else 0)
    if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    if config.normalizes and adaptation.normalization is not None:
        steps.arithmetic("Mul", adaptation.normalization.std)
        steps.arithmetic("Add", adaptation.normalization.mean)
    channels = given.shape[1]
    if image and config.channels is not None and config.channels != channels:
        if config.channels == 3:
            steps.add("Concat", [steps.at] * 3, axis=1)
        else:
            weights = np.array([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1)
            steps.add("Conv", [steps.at, steps.constant(weights)])
    if image and config.channel_order == "bgr":
        steps.add("Gather", [steps.at, steps.constant(np.array([2, 1, 0]))], axis=1)
    if image and config.image_size is not None:
        opset = opset_of(model)
        if opset < _RESIZE_OPSET:
            raise InputError(
                f"the ONNX teacher is of opset {opset}, which cannot resize images",
                where=f"teacher.preprocess.image_size: {path.name}",
                remedy=f"export it with opset {_RESIZE_OPSET} or newer",
            )
        steps.resize(config.image_size, given, config.interpolation)
    if config.normalizes:
        if config.scale is not None:
            steps.arithmetic("Mul", (config.scale,))
        steps.arithmetic("Sub", config.mean or (0.0,))
        steps.arithmetic("Div", config.std or (1.0,))
    if image and config.layout == "nhwc":
        steps.add("Transpose", [steps.at], perm=[0, 2, 3, 1])
    steps.finish(inner)
    # The pipeline's shape; the batch size remains the file's own.
    batch = value.type.tensor_type.shape.dim[0]
    sizes = [batch.dim_value or batch.dim_param or "batch", *given.shape[1:]]
    value.CopyFrom(onnx.helper.make_tensor_value_info(given.name, onnx.TensorProto.FLOAT, sizes))


class _Steps:
    """Insert a chain of nodes before a graph's own."""

    def __init__(self, graph: onnx.GraphProto, start: str, kind: int, rank: int) -> None:
        self.at, self._graph, self._kind, self._rank = start, graph, kind, rank
        self._nodes: list[onnx.NodeProto] = []

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> None:
        name = f"edgekd/adapt_{len(self._nodes)}"
        self._nodes.append(onnx.helper.make_node(operator, inputs, [name], name=name, **attributes))
        self.at = name

    def constant(self, values: np.ndarray[Any, Any]) -> str:
        name = f"edgekd/adapt_constant_{len(self._graph.initializer)}"
        self._graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        return name

    def arithmetic(self, operator: str, numbers: tuple[float, ...]) -> None:
        values = np.asarray(numbers, np.float32)
        if self._rank == 4:
            values = values.reshape(1, -1, 1, 1)
        self.add(operator, [self.at, self.constant(values)])

    def resize(self, size: tuple[int, int], given: TensorSpec, mode: str) -> None:
        height, width = (float(s) for s in given.shape[2:] if isinstance(s, int))
        scales = np.array([1, 1, size[0] / height, size[1] / width], np.float32)
        kind = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}[mode]
        place = "asymmetric" if mode == "nearest" else "half_pixel"
        attributes: dict[str, Any] = {"coordinate_transformation_mode": place, "mode": kind}
        if mode == "nearest":
            attributes["nearest_mode"] = "floor"
        if mode == "bicubic":
            attributes["cubic_coeff_a"] = -0.75
        self.add("Resize", [self.at, "", self.constant(scales)], **attributes)

    def finish(self, name: str) -> None:
        if self._kind != onnx.TensorProto.FLOAT:
            self.add("Cast", [self.at], to=self._kind)
        self._nodes[-1].output[0] = name
        own = list(self._graph.node)
        del self._graph.node[:]
        self._graph.node.extend([*self._nodes, *own])


def _reorder(graph: onnx.GraphProto, adaptation: Adaptation) -> None:
    """Gather the data's classes from the outputs."""
    name = adaptation.output
    value = next(v for v in graph.output if v.name == name)
    inner = f"{name}/unordered"
    for node in graph.node:
        node.output[:] = [inner if out == name else out for out in node.output]
        node.input[:] = [inner if given == name else given for given in node.input]
    order = onnx.numpy_helper.from_array(np.array(adaptation.order), "edgekd/order_of_classes")
    graph.initializer.append(order)
    graph.node.append(onnx.helper.make_node("Gather", [inner, order.name], [name], axis=-1))
    value.type.tensor_type.shape.dim[-1].dim_value = len(adaptation.order or ())
