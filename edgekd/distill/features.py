"""Features inside a network: the outputs of layers that are named by their module path, and the
adapters from a student's feature to the shape of a teacher's.

A feature is a map (B, C, H, W), a sequence (B, T, F) or a vector (B, F). Adapters are made once,
from the captured shapes, and are trained with the student; the exported student has none of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from edgekd.errors import InputError, unknown_name
from edgekd.models.dict_model import DictModel

Shape = tuple[int, ...]
"""A captured tensor's shape, the batch included."""

SAME_LAYERS = "compare layers of the same shape, for the same samples"
SAME_CLASSES = "both must have the same classes, in the same order"
"""What to do about two shapes that differ: layers', and outputs'."""

_KINDS = {2: "a vector (B, F)", 3: "a sequence (B, T, F)", 4: "a map (B, C, H, W)"}

Hook = Callable[[nn.Module, Any, Any], None]

_ELEMENT = re.compile(r"^(?P<path>.*?)\[(?P<index>\d+)\]$")


def layer_key(layer: str) -> str:
    """The key of a layer's feature among a model's outputs; no output has such a name."""
    return f"@{layer}"


@dataclass(frozen=True)
class Layer:
    """One layer as ``edgekd layers`` lists it; without a shape where it outputs no tensor or was
    not run.
    """

    path: str
    kind: str
    parameters: int
    shape: tuple[int, ...] | None


class FeatureExtractor:
    """Captures the outputs of named layers in each forward pass, with their graph.

    Args:
        model: the network; a :class:`DictModel` is unwrapped.
        layers: module paths (``features.layers.2``); ``path[1]`` is the second tensor of a layer
            that outputs several. A mapping gives for each its config path, for errors.
        where: whose layers they are (``student``, ``teacher``), for errors without a mapping.

    Raises:
        InputError: there is no such layer; the nearest path is suggested.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], where: str = "model") -> None:
        self._places = dict(layers if isinstance(layers, Mapping) else dict.fromkeys(layers, where))
        self.layers = tuple(self._places)
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._handles: list[RemovableHandle] = []
        modules = dict(_network(model).named_modules())
        for layer in self.layers:
            path, index = _split(layer)
            if not path or path not in modules:
                raise unknown_name("layer", path, filter(None, modules), self._places[layer])
            self._handles.append(modules[path].register_forward_hook(self._keep(layer, index)))

    def take(self) -> dict[str, Tensor]:
        """The features of the forward pass just done, by :func:`layer_key`; clears them.

        Raises:
            InputError: a layer was not run, was run twice, outputs no tensor, or its output was
                changed in place afterwards, so that it is not the layer's feature any more.
        """
        seen, self._seen = self._seen, {}
        features = {}
        for layer in self.layers:
            if layer not in seen:
                raise InputError(
                    f"the layer {layer!r} is not run in the forward pass",
                    where=self._places[layer],
                    remedy="name a layer that is run",
                )
            tensor, version = seen[layer]
            if _version(tensor) != version:
                raise InputError(
                    f"the output of {layer!r} is changed in place by a later layer, such as "
                    "ReLU(inplace=True): what would be compared is not that layer's feature",
                    where=self._places[layer],
                    remedy="name the later layer, or build the network without inplace=True",
                )
            features[layer_key(layer)] = tensor
        return features

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, layer: str, index: int | None) -> Hook:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if layer in self._seen:
                # A forward that raised leaves partial captures behind.
                raise InputError(
                    f"the layer {layer!r} is run more than once in a forward pass",
                    where=self._places[layer],
                    remedy="name a layer that is run once, such as the block around it",
                )
            tensor = _tensor(output, index)
            if tensor is None:
                raise InputError(
                    f"the layer {layer!r} outputs {_described(output)}, not a tensor",
                    where=self._places[layer],
                    remedy=f"name an element of it, such as {_split(layer)[0]}[0]",
                )
            self._seen[layer] = (tensor, _version(tensor))

        return keep


def list_layers(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Layer]:
    """Every layer with its path, class and the shape of its output for a batch, in module order."""
    network = _network(model)
    shapes: dict[str, tuple[int, ...]] = {}

    def record(path: str) -> Hook:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _tensor(output, None)
            if tensor is not None:
                shapes[path] = tuple(tensor.shape)

        return hook

    named = [(path, module) for path, module in network.named_modules() if path]
    handles = [module.register_forward_hook(record(path)) for path, module in named]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [
        Layer(
            path,
            type(module).__name__,
            sum(parameter.numel() for parameter in module.parameters()),
            shapes.get(path),
        )
        for path, module in named
    ]


def _network(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DictModel) else model


def _split(layer: str) -> tuple[str, int | None]:
    match = _ELEMENT.match(layer)
    return (match["path"], int(match["index"])) if match else (layer, None)


def _tensor(output: object, index: int | None) -> Tensor | None:
    """The tensor of a layer's output: the output itself, or an element of several."""
    if isinstance(output, Tensor):
        return output if index in (None, 0) else None
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        chosen = output if index is None else output[index : index + 1]
        tensors = [entry for entry in chosen if isinstance(entry, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    return None


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; not counted in inference mode (validation)."""
    return 0 if tensor.is_inference() else tensor._version


def _described(output: object) -> str:
    if isinstance(output, tuple | list):
        return f"{len(output)} values"
    return f"a {type(output).__name__}"


def channel_dim(feature: Tensor | Shape) -> int:
    """Where the channels are: the second dimension of a map, the last of anything else."""
    rank = feature.ndim if isinstance(feature, Tensor) else len(feature)
    return 1 if rank == 4 else -1


def adapter(
    student: Shape,
    teacher: Shape,
    *,
    batch_norm: bool = True,
    relu: bool = False,
    always: bool = False,
) -> nn.Module:
    """A module from the student's channels to the teacher's; heights and widths are unchanged.

    A 1x1 convolution for maps, a linear layer for sequences and vectors.

    Args:
        student: the captured shape.
        teacher: the captured shape.
        batch_norm: a batch norm after the convolution.
        relu: a ReLU at the end of a map's adapter, for a teacher that is never negative.
        always: also when the channels are equal; otherwise those need no adapter.

    Raises:
        InputError: the shapes differ in rank or in sequence length.
    """
    check_same_kind(student, teacher)
    dim = channel_dim(student)
    source, target = student[dim], teacher[dim]
    if source == target and not always:
        return nn.Identity()
    if len(student) != 4:
        return nn.Linear(source, target)
    layers: list[nn.Module] = [nn.Conv2d(source, target, 1, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(target))
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def regressor(student: Shape, teacher: Shape) -> nn.Module:
    """Three 1x1 convolutions (linear layers) as wide as the teacher, with ReLU between them.

    The network μ of VID (Ahn et al. 2019).

    Raises:
        InputError: the shapes differ in rank or in sequence length.
    """
    check_same_kind(student, teacher)
    dim = channel_dim(student)
    source, target = student[dim], teacher[dim]

    def layer(inputs: int) -> nn.Module:
        return nn.Conv2d(inputs, target, 1) if len(student) == 4 else nn.Linear(inputs, target)

    return nn.Sequential(layer(source), nn.ReLU(), layer(target), nn.ReLU(), layer(target))


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps averaged down to the smaller height and the smaller width.

    Sequences and vectors are returned unchanged.
    """
    if first.ndim != 4 or second.ndim != 4:
        return first, second
    size = smaller_size(first, second)
    return _pooled(first, size), _pooled(second, size)


def _pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


def smaller_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps."""
    return min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3])


def resize(feature: Tensor, like: Tensor) -> Tensor:
    """A map interpolated bilinearly to another one's height and width."""
    if feature.shape[2:] == like.shape[2:]:
        return feature
    return F.interpolate(feature, size=like.shape[2:], mode="bilinear", align_corners=False)


def check_same_kind(student: Shape, teacher: Shape) -> None:
    """Check that the two shapes can be matched by an adapter.

    Raises:
        InputError: the shapes differ in rank or in sequence length, or are of no known kind.
    """
    if len(student) != len(teacher) or len(student) not in _KINDS:
        raise _mismatch(
            student, teacher, "cannot be matched", f"both must be {', '.join(_KINDS.values())}"
        )
    if len(student) == 3 and student[1] != teacher[1]:
        raise _mismatch(
            student,
            teacher,
            "differ in sequence length",
            "compare layers that see the same tokens, or pooled features",
        )


def check_same_shape(student: Tensor, teacher: Tensor, remedy: str = SAME_LAYERS) -> None:
    """Check that both shapes are equal: broadcasting would silently give a wrong loss.

    Raises:
        InputError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise _mismatch(tuple(student.shape), tuple(teacher.shape), "differ in shape", remedy)


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Check that both are maps of the same samples; channels, height and width may differ.

    Raises:
        InputError: one is no map, or the batches differ.
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise _mismatch(
            tuple(student.shape),
            tuple(teacher.shape),
            "are not two maps (B, C, H, W) of the same samples",
            "name layers that output maps",
        )


def _mismatch(student: Shape, teacher: Shape, what: str, remedy: str) -> InputError:
    return InputError(f"student {list(student)} and teacher {list(teacher)} {what}", remedy=remedy)
