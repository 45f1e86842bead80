"""What a target is, and how one is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgekd.errors import InputError, unknown_name
from edgekd.targets.local import LocalTarget


class Target(Protocol):
    """A machine that has edgerun and runs each call in a fresh process of its own."""

    @property
    def name(self) -> str:
        """What :func:`open_target` opens it by."""
        ...

    def bench(
        self,
        model: Path,
        against: Path | None = None,
        *,
        inputs: Path | None = None,
        shapes: Sequence[str] = (),
        batch: int | None = None,
        threads: int | None = None,
        providers: Sequence[str] = (),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        against_options: Mapping[str, Mapping[str, str]] | None = None,
        optimization: str = "all",
        min_queries: int = 1000,
        max_seconds: float = 60.0,
        seed: int = 0,
        memory: bool = True,
    ) -> dict[str, Any]:
        """Measure one model, or two in interleaved rounds: a record ``edgerun.bench/1``."""
        ...

    def run(
        self,
        model: Path,
        inputs: Path,
        output: Path,
        *,
        batch: int | None = None,
        threads: int | None = None,
        providers: Sequence[str] = (),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        optimization: str = "all",
        manifest: Path | None = None,
        raw: bool = False,
    ) -> None:
        """Write the model's answers for every sample of an npz file to another one."""
        ...

    def probe(
        self,
        model: Path,
        *,
        inputs: Path | None = None,
        shapes: Sequence[str] = (),
        batch: int | None = None,
        threads: int | None = None,
        providers: Sequence[str] = (),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        optimization: str = "all",
        run: bool = True,
        max_seconds: float = 300.0,
    ) -> dict[str, Any]:
        """Open a model and run it once: a record ``edgerun.probe/1``."""
        ...

    def build(
        self,
        model: Path,
        engine: Path,
        *,
        library: str,
        compute_capabilities: Sequence[str] = (),
        precision: str | None = None,
        keep: Sequence[str] = (),
        shapes: Sequence[str] = (),
        batch: int = 1,
        workspace_mb: float | None = None,
        timing_cache: Path | None = None,
        version_compatible: bool = False,
        hardware_compatible: bool = False,
        dla: int | None = None,
        gpu_fallback: bool = True,
    ) -> dict[str, Any]:
        """Build a TensorRT engine for the machine: a record ``edgerun.build/1``."""
        ...

    def parse(self, model: Path, library: str) -> dict[str, Any]:
        """What the machine's TensorRT parser says to a model: a record ``edgerun.parse/1``."""
        ...

    def info(self, model: Path | None = None) -> dict[str, Any]:
        """Describe the machine, and a model's inputs and outputs: ``edgerun.info/1``."""
        ...


def open_target(name: str, where: str | None = "target") -> Target:
    """The target that a pipeline or an option names.

    Raises:
        InputError: an unknown name, or ``ssh://…``, which this version does not have.
    """
    if name == LocalTarget.name:
        return LocalTarget()
    if name.startswith("ssh://"):
        raise InputError(
            f"target {name!r} is on another machine, which comes in a later version",
            where=where,
            remedy="use 'local' here; on the device, unpack the bundle and run "
            "'python -m edgerun bench MODEL.onnx'",
        )
    raise unknown_name("target", name, [LocalTarget.name], where)
