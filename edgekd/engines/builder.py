"""What builds an engine file: the interface, and builders of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from edgekd.config.pipeline import ENGINES_GROUP, ExternalEngineConfig
from edgekd.errors import EdgekdError, InputError
from edgekd.extension import check_arguments, resolve

Precision = Literal["fp32", "fp16", "bf16", "int8"]


class EngineBuilder(Protocol):
    """Builds an engine file for a runtime from an ONNX file."""

    suffix: str
    """Of the file, such as ``.onnx``. The target must be able to run it: ``local`` runs ``.onnx``
    in ONNX Runtime and ``.engine`` in TensorRT, a target of your own what it likes."""
    settings: dict[str, Any]
    """Keyword arguments of a target's ``run`` and ``bench`` for all of its engines; a file's own
    ``provider_options`` and ``run_level`` are in its row."""

    def build(
        self, source: Path, out: Path, precision: Precision, keep: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Write ``out``, and return how: ``providers_requested``, ``threads``, ``run_level`` and
        more, for the record. A builder of your own may return ``{}`` (one thread on the CPU).

        Args:
            source: the ONNX file.
            out: where to write; its suffix is :attr:`suffix`.
            precision: the precision that the file computes in.
            keep: nodes left in float32 intentionally.
        """
        ...

    def describe(self) -> str:
        """A short description of what runs the engine."""
        ...


class ExternalBuilder:
    """A builder that the pipeline names, with a complete record.

    Raises:
        InputError: nothing has its name, an argument is wrong, or it is no engine builder.
    """

    def __init__(self, config: ExternalEngineConfig, where: str | None = "engines") -> None:
        found = resolve(config.name, {}, "engine", where, group=ENGINES_GROUP)
        if callable(found):
            title = f"engine {config.name!r}"
            arguments = check_arguments(found, config.args, name=title, where=where)
            try:
                found = found(**arguments)
            except EdgekdError:
                raise
            except Exception as error:
                raise InputError(
                    f"{title} fails when made: {type(error).__name__}: {error}",
                    where=where,
                    remedy="call it in python alone to see the whole traceback",
                ) from error
        lacking = [m for m in ("suffix", "settings", "build", "describe") if not hasattr(found, m)]
        if lacking:
            raise InputError(
                f"{config.name!r} is not an engine: it has no {', '.join(lacking)}",
                where=where,
                remedy="give it what edgekd.engines.builder.EngineBuilder describes",
            )
        self._builder: EngineBuilder = found
        self.suffix, self.settings = found.suffix, dict(found.settings)

    def build(
        self, source: Path, out: Path, precision: Precision, keep: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Build the engine; see :meth:`EngineBuilder.build`."""
        record: Mapping[str, Any] = self._builder.build(source, out, precision, keep)
        return {
            "file": out.name,
            "size_bytes": out.stat().st_size,
            "providers_requested": ["CPUExecutionProvider"],
            "threads": 1,
            "run_level": "all",
            **record,
        }

    def describe(self) -> str:
        """A short description of what runs the engine."""
        return self._builder.describe()
