"""The interface of a loaded model, independent of its runtime, and the settings to open it.

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
