"""A model as its runtime declares it: inputs and outputs, batch axis, shapes to feed, settings.

Needs no runtime: a device may have ONNX Runtime, or TensorRT, or both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Protocol, Sequence

import numpy as np

from edgerun.errors import BadInput


@dataclass(frozen=True)
class TensorInfo:
    """A declared input or output.

    ``shape`` holds a size, the name of a symbolic dimension, or None for one without a name;
    ``dtype`` is numpy's name, or the runtime's own where numpy has none (``tensor(string)``).
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def to_json(self) -> dict[str, Any]:
        """``{"name", "dtype", "shape"}`` with null for a dimension without a name."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{written(self.shape)}"


_NO_NAME = re.compile(r"(\?*|None|-?\d+|unk__\d+)", re.IGNORECASE)


def dimension_name(name: Any) -> str | None:
    """The name of a symbolic dimension; None without one.

    Exporters write "?", "None", "-1" or "unk__12" for every dimension that they do not know:
    two of these are not one dimension, whatever they are called.
    """
    text = "" if name is None else str(name).strip()
    return None if _NO_NAME.fullmatch(text) else text


def written(shape: Sequence[int | str | None]) -> str:
    """A shape as text: ``[batch, 3, ?, 224]``."""
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def written_feed(feed: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """The shapes of a feed: ``x [1, 3], state [2, 1, 8]``."""
    return ", ".join(f"{name} {written(array.shape)}" for name, array in feed.items())


@dataclass(frozen=True)
class Settings:
    """Settings to open a model. ``threads`` None leaves the number to the runtime.

    ``provider_options`` are by provider; one that is not in it has the runtime's defaults.
    They are ONNX Runtime's; a TensorRT engine has all of its settings built in.
    """

    threads: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    optimization: str = "all"
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class LoadedModel(Protocol):
    """A model in memory, ready to run.

    Attributes:
        providers: the execution providers, in order of preference.
        load_ms: how long opening took, in milliseconds.
    """

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    providers: tuple[str, ...]
    load_ms: float

    @property
    def batch_range(self) -> tuple[int, int] | None:
        """The smallest and the largest batch that an engine of open batch size accepts; None:
        any.
        """

    @property
    def device_ms(self) -> Callable[[Mapping[str, np.ndarray[Any, Any]]], float] | None:
        """Milliseconds of one query on the GPU alone; None where that cannot be timed."""

    @property
    def information(self) -> Callable[[], str] | None:
        """The layers of an engine from TensorRT's inspector, as JSON; None for an ONNX file."""

    @property
    def query(self) -> Callable[[Mapping[str, np.ndarray[Any, Any]]], Any]:
        """The timed call: run a valid feed with the least overhead."""

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
        """The outputs in declared order for one feed.

        Raises:
            BadInput: the feed does not fit what the model declares.
            RunFailed: the runtime fails.
        """


def check_file(path: Path) -> None:
    """Raise BadInput when there is no such file."""
    if not path.exists():
        raise BadInput("there is no such model file", str(path), "check the path")
    if not path.is_file():
        raise BadInput("the model is a folder, not a file", str(path), "give the file in it")


def full_provider_name(name: str) -> str:
    """``cpu`` → ``CPUExecutionProvider``; a full name is unchanged."""
    try:
        import onnxruntime
    except ImportError:
        return name
    known: list[str] = onnxruntime.get_all_providers()
    for full in known:
        if name.lower() in (full.lower(), full.lower().replace("executionprovider", "")):
            return full
    return name


IMAGE_SIDE = 224
CHANNELS = (1, 3, 4)
_BATCH = re.compile(r".*batch|bs$", re.IGNORECASE)
_SHAPE_OPTION = re.compile(r"^(?P<name>.+)=(?P<shape>[1-9]\d{0,17}(?:x[1-9]\d{0,17})*|)$")


@dataclass(frozen=True)
class BatchLayout:
    """The batch axes of a model's inputs.

    Attributes:
        axes: input name → the axis that counts samples; None for an input shared by all samples
            (a scalar, or a state without a batch dimension).
        size: the model's fixed batch size; None when it is open.
        names: the symbolic names of the batch dimension.
    """

    axes: Mapping[str, int | None]
    size: int | None
    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, inputs: Sequence[TensorInfo]) -> BatchLayout:
        """Read the layout from declared shapes.

        An open first dimension is the batch, and so is every other dimension of the same
        symbolic name (a recurrent state is often ``[layers, batch, units]``), and the only open
        dimension of an input, where no other input has one of its name. A dimension that is
        called batch is it at any position (``[time, batch, features]``). Without an open
        dimension that counts samples, the first input's size is the batch of all that have it.
        """
        open_first = [t for t in inputs if t.shape and not isinstance(t.shape[0], int)]
        names = frozenset(t.shape[0] for t in open_first if isinstance(t.shape[0], str))
        axes: dict[str, int | None]
        called = {d for t in inputs for d in t.shape if isinstance(d, str) and _BATCH.match(d)}
        if called and not called & names:
            axes = {
                t.name: next((i for i, d in enumerate(t.shape) if d in called), None)
                for t in inputs
            }
            return cls(axes, None, frozenset(called))
        if open_first:
            known = {d for t in open_first for d in t.shape if isinstance(d, str)}
            axes = {}
            for tensor in inputs:
                named = [i for i, d in enumerate(tensor.shape) if d in names]
                free = [i for i, d in enumerate(tensor.shape) if not isinstance(d, int)]
                if tensor in open_first:
                    axes[tensor.name] = 0
                elif named:
                    axes[tensor.name] = named[0]
                else:
                    alone = len(free) == 1 and tensor.shape[free[0]] not in known
                    axes[tensor.name] = free[0] if alone else None
            return cls(axes, None, names)
        first = next((t.shape[0] for t in inputs if t.shape), None)
        fixed = first if isinstance(first, int) else None
        found = {t.name: [i for i, d in enumerate(t.shape) if d == fixed] for t in inputs}
        return cls({name: next(iter(of), None) for name, of in found.items()}, fixed)

    def axis_of(self, output: TensorInfo) -> int:
        """The batch axis of an output: that of the batch's name, else the first."""
        return next((i for i, d in enumerate(output.shape) if d in self.names), 0)

    def batch(self, wanted: int | None, default: int = 1) -> int:
        """The batch size to use.

        Raises:
            BadInput: the model's fixed batch size differs from the requested one.
        """
        if self.size is None:
            return wanted or default
        if wanted not in (None, self.size):
            raise BadInput(
                f"the model is built for batch size {self.size}, not {wanted}",
                where="--batch",
                remedy=f"leave --batch out, or export the model again for batch {wanted}",
            )
        return self.size


@dataclass(frozen=True)
class ChosenShape:
    """The shape that an input is fed with, and a note on each chosen size."""

    shape: tuple[int, ...]
    note: str


def parse_shapes(options: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["x=1x3x224x224", "sr="]`` → sizes by input name; nothing after = is a scalar.

    Raises:
        BadInput: an option of another form, a size of zero, or one input twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for option in options:
        match = _SHAPE_OPTION.match(option)
        if match is None:
            shown = option if len(option) <= 80 else f"{option[:80]}…"
            raise BadInput(
                f"{shown!r} is not a shape",
                where="--shape",
                remedy="write NAME=1x3x224x224, with sizes of at least 1",
            )
        if match.group("name") in shapes:
            raise BadInput(f"the shape of {match.group('name')!r} is given twice", "--shape")
        sizes = match.group("shape")
        shapes[match.group("name")] = tuple(map(int, sizes.split("x"))) if sizes else ()
    return shapes


def choose_shapes(
    inputs: Sequence[TensorInfo], given: Mapping[str, tuple[int, ...]], batch: int | None
) -> dict[str, ChosenShape]:
    """The shape to feed each input with.

    An open dimension has the given size; else the batch size on the batch axis, 224 for the
    height and width of an image (four dimensions, 1, 3 or 4 channels), and 1 otherwise.

    Raises:
        BadInput: a given shape contradicts the declared one, or the batch the fixed one.
    """
    layout = BatchLayout.of(inputs)
    size = layout.batch(batch)
    chosen = {}
    for tensor in inputs:
        if tensor.name in given:
            check_shape(tensor, given[tensor.name], where="--shape")
            chosen[tensor.name] = ChosenShape(given[tensor.name], "given")
        else:
            chosen[tensor.name] = _default(tensor, layout.axes[tensor.name], size)
    return chosen


def check_shape(tensor: TensorInfo, shape: Sequence[int], where: str) -> None:
    """Raise BadInput when a shape does not fit the declared one."""
    fits = len(shape) == len(tensor.shape) and not any(
        isinstance(declared, int) and declared != size
        for declared, size in zip(tensor.shape, shape)
    )
    if not fits:
        raise BadInput(
            f"shape {written(shape)} does not fit input {tensor}",
            where=where,
            remedy="the number of dimensions and each fixed size must be the declared ones",
        )


def _default(tensor: TensorInfo, batch_axis: int | None, batch: int) -> ChosenShape:
    sides = _image_sides(tensor)
    sizes, notes = [], []
    for axis, declared in enumerate(tensor.shape):
        if isinstance(declared, int):
            sizes.append(declared)
            continue
        if axis == batch_axis:
            size, reason = batch, "batch"
        elif axis in sides:
            size, reason = IMAGE_SIDE, "image side"
        else:
            size, reason = 1, "default"
        sizes.append(size)
        notes.append(f"axis {axis} ({declared or 'open'}) = {size} ({reason})")
    return ChosenShape(tuple(sizes), "; ".join(notes) or "declared")


def _image_sides(tensor: TensorInfo) -> tuple[int, ...]:
    if len(tensor.shape) != 4:
        return ()
    if tensor.shape[1] in CHANNELS:
        return (2, 3)
    return (1, 2) if tensor.shape[3] in CHANNELS else ()
