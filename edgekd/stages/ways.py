"""The ways in which the student was written: float32, and what the quantize stage made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context
from edgekd.stages.building import Precision
from edgekd.stages.fitting import read_json
from edgekd.stages.quantize import INDEX, STUDENT, Runtime


@dataclass(frozen=True)
class Way:
    """One way in which the student was written: its name, its file and what the index says."""

    name: str
    file: Path
    entry: Mapping[str, Any]

    @property
    def precision(self) -> Precision:
        """What its layers were made to compute in."""
        method = self.entry.get("method")
        if method in ("fp16", "bf16"):
            return "fp16" if method == "fp16" else "bf16"
        computes_in_float = method in (None, "weights-only")
        return "fp32" if computes_in_float else "int8"

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers that were left in float32 on purpose."""
        return tuple(self.entry.get("kept", ()))


def ways_of(inputs: Mapping[str, Path], runtime: Runtime) -> list[Way]:
    """float32 first, then what was made for this runtime's scheme."""
    from edgekd.engines.choice import FLOAT

    index = read_json(inputs["quantize"] / INDEX)
    return [
        Way(FLOAT, inputs["export"] / STUDENT, {}),
        *(
            Way(name, inputs["quantize"] / entry["file"], entry)
            for name, entry in index.items()
            if "file" in entry and entry["runtime"] in (None, runtime)
        ),
    ]


def refused_ways(inputs: Mapping[str, Path], runtime: Runtime) -> dict[str, str]:
    """What was asked for and is no candidate for this runtime, with the reason."""
    return {
        name: entry.get("refused") or f"is for {entry['runtime']}"
        for name, entry in read_json(inputs["quantize"] / INDEX).items()
        if "file" not in entry or entry["runtime"] not in (None, runtime)
    }


def narrowest(context: Context, ways: list[Way]) -> Way:
    """The narrowest file that keeps to the drop: there is no latency to choose by."""
    quantize = context.job.config.quantize
    allowed = quantize.max_drop if quantize is not None else 0.0
    order: list[Precision] = ["int8", "fp16", "bf16", "fp32"]
    fits = [way for way in ways if not way.entry or way.entry["drop"] <= allowed]
    return min(
        fits,
        key=lambda way: (order.index(way.precision), len(way.kept), way.entry.get("drop", 0.0)),
    )
