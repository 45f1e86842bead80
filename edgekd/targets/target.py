"""What a target is: a machine with edgerun that runs and measures models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

from typing_extensions import Unpack

from edgerun.tensorrt.settings import BuildSettings

ProviderOptions = Mapping[str, Mapping[str, str]]
"""Provider → option → value; see :attr:`edgekd.engines.onnxruntime.EngineInfo.provider_options`."""


class ModelSettings(TypedDict, total=False):
    """How a model is opened and called; what is not given or None is edgerun's default."""

    batch: int | None
    """Samples of one query."""
    threads: int | None
    """The runtime's threads for one operator; the runtime's choice by default."""
    providers: Sequence[str]
    """ONNX Runtime's execution providers in order; none is the CPU."""
    provider_options: ProviderOptions | None
    optimization: str
    """``disabled``, ``basic``, ``extended`` or ``all``, the default."""


class RunSettings(ModelSettings, total=False):
    """Settings of :meth:`Target.run`."""

    manifest: Path | None
    """The manifest whose preprocessing raw samples need."""
    raw: bool
    """Preprocess samples of any dtype, not only uint8."""


class ProbeSettings(ModelSettings, total=False):
    """Settings of :meth:`Target.probe`."""

    inputs: Path | None
    """An npz file with the models' inputs; None makes random ones. Where those do not fit the
    model, a probe only opens it."""
    shapes: Sequence[str]
    """``NAME=1x3x224x224`` for random inputs."""
    run: bool
    """Whether to run the model at all."""


class LatencyLimits(TypedDict, total=False):
    """Limits of a benchmark: processes are added until each is outside its figure's interval."""

    budget_p50_ms: float | None
    """Of a percentile, in ms."""
    budget_p90_ms: float | None
    budget_p95_ms: float | None
    budget_p99_ms: float | None
    budget_speedup: float | None
    """Of the ratio of ``against`` to the model."""


class BenchSettings(ModelSettings, LatencyLimits, total=False):
    """Settings of :meth:`Target.bench`; ``inputs`` and ``shapes`` as in :class:`ProbeSettings`."""

    inputs: Path | None
    shapes: Sequence[str]
    against_options: ProviderOptions | None
    """Those with which ``against`` is opened, a file of another precision for example; None is
    ``provider_options``."""
    min_queries: int
    """Timed queries of each model, 1000 by default, unless ``max_seconds`` are over before."""
    max_seconds: float
    """Of timing all models in all processes, 60 by default."""
    seed: int
    """Of random inputs."""
    processes: int
    """Fresh processes at least, 5 by default, each of which opens the models anew."""
    max_processes: int | None
    """At most; three times as many by default."""
    memory: bool
    """Whether to measure peak memory, in additional processes."""


class Target(Protocol):
    """A machine with edgerun that runs each call in a fresh process."""

    @property
    def name(self) -> str:
        """What :func:`edgekd.targets.open_target` opens it by."""
        ...

    def bench(
        self, model: Path, against: Path | None = None, **settings: Unpack[BenchSettings]
    ) -> dict[str, Any]:
        """Measure one model, or two in interleaved rounds: a record ``edgerun.bench/1``.

        Args:
            model: an ONNX file or an engine.
            against: another one; the record's ratio is its p50 over the model's.
        """
        ...

    def run(self, model: Path, inputs: Path, output: Path, **settings: Unpack[RunSettings]) -> None:
        """Write the model's outputs for every sample of an npz file to another one.

        Args:
            model: an ONNX file or an engine.
            inputs: an npz file with the model's inputs by name.
            output: the npz file to write, the outputs by name.
        """
        ...

    def probe(self, model: Path, **settings: Unpack[ProbeSettings]) -> dict[str, Any]:
        """Open a model and run it once: a record ``edgerun.probe/1``.

        Args:
            model: an ONNX file.
            max_seconds: time limit.

        Raises:
            CrashError: the runtime ends the process. Where it does so at a high level of graph
                optimization, lower ones were tried and the remedy names the one that works.
            StageError: it takes longer than ``max_seconds``.
        """
        ...

    def build(self, model: Path, engine: Path, settings: BuildSettings) -> dict[str, Any]:
        """Build a TensorRT engine for the machine: a record ``edgerun.build/1``, also written next
        to the engine.
        """
        ...

    def parse(self, model: Path, library: str) -> dict[str, Any]:
        """The verdict of the machine's TensorRT parser on a model: a record ``edgerun.parse/1``."""
        ...

    def info(self, model: Path | None = None) -> dict[str, Any]:
        """Describe the machine, and a model's inputs and outputs: ``edgerun.info/1``."""
        ...
