"""Settings of a TensorRT build: precision, flags, and ranges of input shapes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from edgerun.errors import BadInput
from edgerun.model import dimension_name
from edgerun.tensorrt.library import Library

_SHAPE_OPTION = re.compile(r"^(?P<name>.+)=(?P<shapes>\d+(?:x\d+)*(?::\d+(?:x\d+)*)*)$")


class Range(NamedTuple):
    """The range of an input's shape; the engine is tuned for the usual one."""

    min: Tuple[int, ...]
    opt: Tuple[int, ...]
    max: Tuple[int, ...]


@dataclass(frozen=True)
class BuildSettings:
    """Settings of an engine's build.

    Attributes:
        library: ``tensorrt`` or ``tensorrt-rtx``.
        compute_capabilities: ``("8.6", "8.9")``: GPUs to build for; empty: this machine's GPU,
            or the library's default without one. tensorrt-rtx alone.
        precision: what convolutions and matrix products must compute in; None: the
            model's own precision.
        keep: nodes that may stay in a wider precision.
        shapes: input name → its :class:`Range`, for inputs with open dimensions.
        batch: the usual and largest size of an open batch dimension without a given shape.
        workspace_mb: limit of the scratch memory, in MB of 10⁶ bytes.
        timing_cache: a file with the tactics timed by earlier builds, read and written.
        version_compatible: also loadable by later releases.
        hardware_compatible: also loadable on other GPUs from Ampere on. tensorrt alone.
        dla: a Jetson's DLA core to run on. tensorrt alone.
        gpu_fallback: whether layers that the DLA cannot run may run on the GPU.
    """

    library: str = "tensorrt"
    compute_capabilities: Tuple[str, ...] = ()
    precision: str | None = None
    keep: Tuple[str, ...] = ()
    shapes: Mapping[str, Range] = field(default_factory=dict)
    batch: int = 1
    workspace_mb: float | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla: int | None = None
    gpu_fallback: bool = True

    def to_json(self) -> Dict[str, Any]:
        """A plain mapping for a JSON file, in which the library stands elsewhere."""
        fields = asdict(self)
        del fields["library"]
        return {
            **fields,
            "compute_capabilities": list(self.compute_capabilities),
            "keep": list(self.keep),
            "shapes": ranges_to_json(self.shapes),
            "timing_cache": None if self.timing_cache is None else str(self.timing_cache),
        }


def is_weakly_typed(library: Library, settings: BuildSettings) -> bool:
    """Whether the precision is requested from the builder.

    Only TensorRT before 11 supports that, and only for types other than float32; otherwise the
    types are the model's.
    """
    return library.weakly_typed and settings.precision not in (None, "fp32")


def check_settings(library: Library, settings: BuildSettings) -> None:
    """Raise BadInput for settings that this library does not support, before the model is read."""
    known = library.compute_capabilities()
    if settings.compute_capabilities and not known:
        raise BadInput(
            f"{library} builds for the GPU it runs on alone",
            where="--sm",
            remedy="leave --sm out and build on the device, or use --library tensorrt-rtx",
        )
    for capability in settings.compute_capabilities:
        if capability not in known:
            raise BadInput(
                f"{library} has no compute capability {capability}",
                where="--sm",
                remedy=f"it has {', '.join(known)}; an engine for a Jetson is built on the Jetson, "
                "with 'python -m edgerun build MODEL.onnx --engine OUT --library tensorrt'",
            )
    if settings.hardware_compatible and known:
        # Tried with 1.7.1: the level is accepted, and the engine is byte-identical.
        raise BadInput(
            f"{library} does not use hardware compatibility",
            where="--hardware-compatible",
            remedy="name each GPU that the engine is for: --sm 8.6 --sm 8.9",
        )
    if settings.dla is not None and settings.precision not in ("fp16", "int8"):
        raise BadInput(
            "a DLA computes in FP16 and INT8 alone",
            where="--dla",
            remedy="add --precision fp16 or --precision int8",
        )


def ranges_to_json(ranges: Mapping[str, Range]) -> Dict[str, Any]:
    """``{"image": {"min": […], "usual": […], "max": […]}}``."""
    return {
        name: {"min": list(one.min), "usual": list(one.opt), "max": list(one.max)}
        for name, one in ranges.items()
    }


def parse_ranges(options: Sequence[str]) -> Dict[str, Range]:
    """``["x=1x4:1x4:8x4", "state=2x3"]`` → ranges by input name; one shape is all three.

    Raises:
        BadInput: an option of another form, a size of zero, or one input twice.
    """
    ranges: Dict[str, Range] = {}
    for option in options:
        match = _SHAPE_OPTION.match(option)
        parts = match.group("shapes").split(":") if match else []
        shapes = [tuple(int(size) for size in part.split("x")) for part in parts]
        if match is None or len(shapes) not in (1, 3) or any(0 in shape for shape in shapes):
            raise BadInput(
                f"{option!r} is not the range of a shape",
                where="--shape",
                remedy="write NAME=MIN:USUAL:MAX, e.g. image=1x1x28x28:1x1x28x28:8x1x28x28, "
                "with sizes of at least 1",
            )
        if match.group("name") in ranges:
            raise BadInput(f"the shape of {match.group('name')!r} is given twice", "--shape")
        ranges[match.group("name")] = Range(*shapes) if len(shapes) == 3 else Range(*shapes * 3)
    return ranges


OPEN = -1
"""The library's notation for an open size."""


@dataclass(frozen=True)
class NetworkInput:
    """A declared input: ``shape`` with −1 where open, ``symbols`` the dimensions' names or ""."""

    name: str
    shape: Tuple[int, ...]
    symbols: Tuple[str, ...]

    @property
    def is_open(self) -> bool:
        """Whether any of its sizes is open."""
        return OPEN in self.shape

    def axis(self, axis: int) -> str:
        """The name of one of its axes, for messages."""
        symbol = f" ({self.symbols[axis]})" if self.symbols[axis] else ""
        return f"axis {axis}{symbol} of input {self.name!r}"

    def __str__(self) -> str:
        sizes = [
            str(size) if size != OPEN else symbol or "?"
            for size, symbol in zip(self.shape, self.symbols)
        ]
        return f"{self.name} [{', '.join(sizes)}]"


def network_inputs(network: Any) -> Tuple[NetworkInput, ...]:
    """The inputs of a parsed network.

    Raises:
        BadInput: the values of an input are sizes (a shape tensor), which have no range here.
    """
    found = []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise BadInput(
                f"the values of input {tensor.name!r} are sizes of other tensors",
                remedy="export the model with these sizes as constants",
            )
        shape = tuple(tensor.shape)
        symbols = tuple(
            dimension_name(tensor.get_dimension_name(axis)) or "" for axis in range(len(shape))
        )
        found.append(NetworkInput(tensor.name, shape, symbols))
    return tuple(found)


def named_dimensions(network: Any) -> Dict[str, List[Dict[str, Any]]]:
    """``inputs`` and ``outputs``: names and shapes as the ONNX file has them.

    An open dimension is its name there, or None; an engine itself knows it as -1 alone.
    """
    counts = {"input": network.num_inputs, "output": network.num_outputs}
    found: Dict[str, List[Dict[str, Any]]] = {}
    for kind, count in counts.items():
        tensors = [getattr(network, f"get_{kind}")(index) for index in range(count)]
        found[f"{kind}s"] = [
            {
                "name": tensor.name,
                "shape": [
                    size if size >= 0 else dimension_name(tensor.get_dimension_name(axis))
                    for axis, size in enumerate(tuple(tensor.shape))
                ],
            }
            for tensor in tensors
        ]
    return found


def choose_ranges(
    inputs: Sequence[NetworkInput], given: Mapping[str, Range], batch: int = 1
) -> Dict[str, Range]:
    """The range of each input with open dimensions.

    An open dimension has the given range, of its input or of another with a dimension of the same
    name. The batch, which is an open first dimension and every other of its name, goes from 1 to
    ``batch`` otherwise.

    Raises:
        BadInput: a range does not fit its input, contradicts another one, is not ordered, or an
            open dimension that is not the batch has none; the message names input and axis.
    """
    by_name = {tensor.name: tensor for tensor in inputs}
    for name, sizes in given.items():
        if name not in by_name:
            known = ", ".join(str(tensor) for tensor in inputs)
            raise BadInput(f"there is no input {name!r}", "--shape", f"the inputs: {known}")
        _check_range(by_name[name], sizes)
    symbols = _symbol_sizes(by_name, given)
    batch_names = {t.symbols[0] for t in inputs if t.shape and t.shape[0] == OPEN} - {""}
    ranges = {}
    for tensor in inputs:
        if not tensor.is_open:
            continue
        if tensor.name in given:
            ranges[tensor.name] = given[tensor.name]
            continue
        columns = []
        for axis, size in enumerate(tensor.shape):
            symbol = tensor.symbols[axis]
            if size != OPEN:
                columns.append((size, size, size))
            elif symbol in symbols:
                columns.append(symbols[symbol][0])
            elif axis == 0 or symbol in batch_names:
                columns.append((1, batch, batch))
            else:
                raise BadInput(
                    f"{tensor.axis(axis)} is open and no size of it is given",
                    where="--shape",
                    remedy=f"give --shape {tensor.name}=MIN:USUAL:MAX, three shapes of "
                    f"{len(tensor.shape)} sizes each",
                )
        ranges[tensor.name] = Range(*zip(*columns))
    return ranges


def _check_range(tensor: NetworkInput, sizes: Range) -> None:
    for shape in sizes:
        if len(shape) != len(tensor.shape):
            raise BadInput(
                f"a shape of {len(shape)} sizes is given for input {tensor}",
                where="--shape",
                remedy=f"give {len(tensor.shape)} sizes",
            )
    for axis, (declared, column) in enumerate(zip(tensor.shape, zip(*sizes))):
        if declared != OPEN and set(column) != {declared}:
            raise BadInput(
                f"{tensor.axis(axis)} is {declared} in the model; given: {_written(column)}",
                where="--shape",
                remedy="only open dimensions have a range",
            )
        if list(column) != sorted(column):
            raise BadInput(
                f"{tensor.axis(axis)} is given as {_written(column)}",
                where="--shape",
                remedy="the least comes first and the largest last",
            )


def _symbol_sizes(
    inputs: Mapping[str, NetworkInput], given: Mapping[str, Range]
) -> Dict[str, Tuple[Tuple[int, int, int], str]]:
    """Dimension name → its sizes and the axis they are from, as a message names it."""
    found: Dict[str, Tuple[Tuple[int, int, int], str]] = {}
    for name, sizes in given.items():
        tensor = inputs[name]
        for axis, column in enumerate(zip(*sizes)):
            symbol = tensor.symbols[axis]
            if tensor.shape[axis] != OPEN or not symbol:
                continue
            earlier, where = found.setdefault(symbol, (column, tensor.axis(axis)))
            if earlier != column:
                raise BadInput(
                    f"{tensor.axis(axis)} is {_written(column)}, and {where} of the same name is "
                    f"{_written(earlier)}",
                    where="--shape",
                    remedy="dimensions of one name have one size",
                )
    return found


def _written(column: Sequence[int]) -> str:
    return ":".join(map(str, column))
