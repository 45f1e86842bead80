"""What an engine is built with."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Sequence, Tuple

from edgerun.errors import BadInput

_SHAPE_OPTION = re.compile(r"^(?P<name>.+)=(?P<shapes>\d+(?:x\d+)*(?::\d+(?:x\d+)*)*)$")


class Range(NamedTuple):
    """The shapes between which one input varies; the engine is tuned for the usual one."""

    least: Tuple[int, ...]
    usual: Tuple[int, ...]
    most: Tuple[int, ...]


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        compute_capabilities: ``("8.6", "8.9")``: GPUs to build for; none is the one that is here,
            or what the library builds for without one. tensorrt-rtx alone.
        precision: what convolutions and matrix products must compute in; None takes what the
            model says.
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
        """A plain mapping for a JSON file."""
        return {
            **asdict(self),
            "compute_capabilities": list(self.compute_capabilities),
            "keep": list(self.keep),
            "shapes": ranges_to_json(self.shapes),
            "timing_cache": None if self.timing_cache is None else str(self.timing_cache),
        }


def ranges_to_json(ranges: Mapping[str, Range]) -> Dict[str, Any]:
    """``{"image": {"min": […], "usual": […], "max": […]}}``."""
    return {
        name: {"min": list(one.least), "usual": list(one.usual), "max": list(one.most)}
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
