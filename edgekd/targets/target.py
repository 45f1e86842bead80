"""What a target is, and how one is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from edgekd.errors import EdgekdError, InputError
from edgekd.extension import check_arguments, resolve
from edgekd.targets.local import LocalTarget


class Target(Protocol):
    """A machine with edgerun that runs each call in a fresh process."""

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
        """Write the model's outputs for every sample of an npz file to another one."""
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
        """The verdict of the machine's TensorRT parser on a model: a record ``edgerun.parse/1``."""
        ...

    def info(self, model: Path | None = None) -> dict[str, Any]:
        """Describe the machine, and a model's inputs and outputs: ``edgerun.info/1``."""
        ...


TARGETS: Mapping[str, Callable[[], Target]] = {LocalTarget.name: LocalTarget}
"""The built-in targets by the names they have in a pipeline."""

_MEMBERS = ("name", "bench", "run", "probe", "build", "parse", "info")


def open_target(name: str, where: str | None = "target") -> Target:
    """The target that a pipeline or an option names.

    Args:
        name: ``local``; or an entry point of ``edgekd.targets``, or ``package.module:name``, of a
            :class:`Target` or of a class or function that gives one without arguments.
        where: the YAML key, for errors.

    Raises:
        InputError: an unknown name, what is no target, or ``ssh://…``, which this version does
            not have.
    """
    if name.startswith("ssh://"):
        raise InputError(
            f"target {name!r} is on another machine, which a later version will support",
            where=where,
            remedy="use 'local' here; on the device, unpack the bundle and run "
            "'python -m edgerun bench MODEL.onnx'",
        )
    found = resolve(name, TARGETS, "target", where, group="edgekd.targets")
    target: Target = _made(found, name, where) if callable(found) else found
    lacking = [member for member in _MEMBERS if not hasattr(target, member)]
    if lacking:
        raise InputError(
            f"{name!r} is not a target: it has no {', '.join(lacking)}",
            where=where,
            remedy="give it what edgekd.targets.Target describes",
        )
    return target


def _made(maker: Callable[[], Target], name: str, where: str | None) -> Target:
    check_arguments(maker, {}, name=f"target {name!r}", where=where)
    try:
        return maker()
    except EdgekdError:
        raise
    except Exception as error:
        raise InputError(
            f"target {name!r} fails when made: {type(error).__name__}: {error}",
            where=where,
            remedy="call it in python alone to see the whole traceback",
        ) from error
