"""Engines to build: builders, student variants, and engines built on the device."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.pipeline import (
    EngineConfig,
    ExternalEngineConfig,
    OnnxRuntimeConfig,
    TensorRTConfig,
)
from edgekd.engines.builder import EngineBuilder, ExternalBuilder, Precision
from edgekd.engines.selection import FLOAT
from edgekd.errors import CrashError, EdgekdError
from edgekd.files import write_npz
from edgekd.pipeline.stage import Context
from edgekd.stages.quantize import INDEX, STUDENT, Runtime
from edgekd.stages.task_data import FURTHER_SCHEMA, VARIANTS_SCHEMA, read_json, write_json

if TYPE_CHECKING:
    from edgekd.onnx.samples import Array

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 0.1, "int8": 0.25}
"""|optimized − exported| over max(1, max|exported|) that building an engine may change. An
optimized INT8 graph rounds in other places, so that a value may be one step off in each layer;
its accuracy is measured on the validation split."""


def common_level(levels: Iterable[str]) -> str:
    """The graph optimization level at which all of these files are correct: ``disabled`` where one
    must not be optimized again (all files are optimized already)."""
    each = list(levels)
    return "disabled" if "disabled" in each else each[0]


def open_builder(
    context: Context, engine: EngineConfig, samples: Mapping[str, Array]
) -> EngineBuilder:
    """The builder for one entry of ``engines``; ``samples`` are real inputs to compare on, (N, …).

    Raises:
        InputError: a provider or TensorRT is not available, or cannot build for the profile on this
            machine; an engine of the user's own is not found or is none.
    """
    if isinstance(engine, OnnxRuntimeConfig):
        return OnnxRuntimeBuilder(context, engine, samples)
    if isinstance(engine, ExternalEngineConfig):
        return ExternalBuilder(engine)
    return TensorRTBuilder(context, engine)


class OnnxRuntimeBuilder:
    """ONNX Runtime: a model optimized offline.

    ``settings`` are keyword arguments of a target's ``run`` and ``bench`` for all engines of a
    builder; a file's own ``provider_options`` and ``run_level`` are in its row.
    """

    suffix = ".onnx"

    def __init__(
        self, context: Context, engine: OnnxRuntimeConfig, samples: Mapping[str, Array]
    ) -> None:
        from edgekd.engines.onnxruntime import provider_chain

        runtime = context.job.profile.runtime
        self.engine, self.cache, self.samples = engine, context.cache, samples
        self.chain = provider_chain(runtime.providers, engine.providers, engine.fallback)
        self.threads = engine.threads or runtime.threads or 1
        self.settings: dict[str, Any] = {
            "providers": self.chain.providers,
            "threads": self.threads,
        }

    def build(
        self, source: Path, out: Path, precision: Precision, keep: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Write the optimized model; see :meth:`edgekd.engines.builder.EngineBuilder.build`.

        Raises:
            CrashError: ONNX Runtime crashes on the file.
        """
        from edgekd.engines.onnxruntime import build_engine

        self._probe(source)
        info = build_engine(
            source,
            out,
            self.chain.providers,
            self.threads,
            self.engine.optimization,
            samples=self.samples,
            tolerance=TOLERANCE[precision],
            fallback=self.engine.fallback,
            left_out=self.chain.left_out,
            cache=self.cache,
        )
        if out.stat().st_size > source.stat().st_size and precision == "int8":
            # Optimizing ahead can fold weights stored in 8 bits back into floats.
            shutil.copyfile(source, out)
            return info.to_json() | {
                "size_bytes": out.stat().st_size,
                "saved_level": "disabled",
                # For the copied file: nothing was left out of it.
                "run_level": "disabled" if info.disabled_optimizers else info.run_level,
            }
        return info.to_json()

    def _probe(self, source: Path) -> None:
        """Open and run the file in another process, before this process does."""
        from edgekd.targets import LocalTarget

        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            inputs = Path(folder) / "samples.npz"
            write_npz(inputs, self.samples)
            try:
                LocalTarget().probe(source, inputs=inputs, **self.settings)
            except CrashError:
                raise
            except EdgekdError:
                pass  # Errors that do not end a process are reported by build_engine.

    def describe(self) -> str:
        """A short description of what runs the engine."""
        return f"ONNX Runtime, {', '.join(self.chain.providers)}, {self.threads} thread(s)"


class TensorRTBuilder:
    """TensorRT or TensorRT for RTX, built by edgerun in a separate process on the target."""

    suffix = ".engine"

    def __init__(self, context: Context, engine: TensorRTConfig) -> None:
        from edgekd.targets import open_target

        job = context.job
        self.engine, self.profile, self.budgets = engine, job.profile, job.budgets
        self.batch = job.config.benchmark.batch_size
        self.target = open_target(job.config.target)
        context.cache.mkdir(parents=True, exist_ok=True)
        self.cache = context.cache / f"{engine.kind}.timing" if engine.kind == "tensorrt" else None
        self.settings: dict[str, Any] = {}

    def build(
        self, source: Path, out: Path, precision: Precision, keep: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Build the engine; see :meth:`edgekd.engines.builder.EngineBuilder.build`."""
        from edgekd.engines.tensorrt import check_runtime, engine_settings

        settings = engine_settings(
            self._for(precision),
            self.profile,
            self.budgets,
            batch=self.batch,
            precision=precision,
            keep=keep,
            timing_cache=self.cache,
        )
        check_runtime(settings, self.profile, source)
        record = self.target.build(source, out, settings)
        return {
            "file": out.name,
            "size_bytes": out.stat().st_size,
            "providers_requested": [self.engine.kind],
            "threads": 1,
            "run_level": "all",
            "record": record,
        }

    def _for(self, precision: Precision) -> TensorRTConfig:
        """A DLA computes in FP16 and INT8 alone: FP32 files (the teacher) run on the GPU."""
        return self.engine.model_copy(update={"dla": None}) if precision == "fp32" else self.engine

    def command(self, model: str, precision: Precision, keep: tuple[str, ...]) -> str:
        """The command that builds the engine on the device."""
        from edgekd.engines.tensorrt import device_command, engine_settings

        settings = engine_settings(
            self._for(precision),
            self.profile,
            self.budgets,
            batch=self.batch,
            precision=precision,
            keep=keep,
        )
        return device_command(settings, model, f"{Path(model).stem}.engine")

    def describe(self) -> str:
        """A short description of what runs the engine."""
        return self.engine.kind


@dataclass(frozen=True)
class StudentVariant:
    """A variant of the student's file: its name, its file and its entry in the index."""

    name: str
    file: Path
    entry: Mapping[str, Any]

    @property
    def precision(self) -> Precision:
        """The precision that its layers compute in."""
        method = self.entry.get("method")
        if method in ("fp16", "bf16"):
            return "fp16" if method == "fp16" else "bf16"
        computes_in_float = method in (None, "weights-only")
        return "fp32" if computes_in_float else "int8"

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers that were left in float32 intentionally."""
        return tuple(self.entry.get("kept", ()))


def variants_of(inputs: Mapping[str, Path], runtime: Runtime) -> list[StudentVariant]:
    """The variants for this runtime's scheme, float32 first."""
    index = read_json(inputs["quantize"] / INDEX, VARIANTS_SCHEMA)
    return [
        StudentVariant(FLOAT, inputs["export"] / STUDENT, {}),
        *(
            StudentVariant(name, inputs["quantize"] / entry["file"], entry)
            for name, entry in index.items()
            if "file" in entry and entry["runtime"] in (None, runtime)
        ),
    ]


def refused_variants(inputs: Mapping[str, Path], runtime: Runtime) -> dict[str, str]:
    """The requested variants that are no candidates for this runtime, with the reason."""
    return {
        name: entry.get("refused") or f"is for {entry['runtime']}"
        for name, entry in read_json(inputs["quantize"] / INDEX, VARIANTS_SCHEMA).items()
        if "file" not in entry or entry["runtime"] not in (None, runtime)
    }


def lowest_precision(context: Context, variants: list[StudentVariant]) -> StudentVariant:
    """The lowest-precision file within the allowed drop: there is no latency to select by."""
    quantize = context.job.config.quantize
    allowed = quantize.max_drop if quantize is not None else 0.0
    order: list[Precision] = ["int8", "fp16", "bf16", "fp32"]
    fits = [
        variant for variant in variants if not variant.entry or variant.entry["drop"] <= allowed
    ]
    return min(
        fits,
        key=lambda variant: (
            order.index(variant.precision),
            len(variant.kept),
            variant.entry.get("drop", 0.0),
        ),
    )


FURTHER = "further"
"""The folder: for each TensorRT entry the student's ONNX file, its settings, and the engine where
it is built already; the same for additional ONNX Runtime entries."""


def write_further(
    context: Context,
    engine: EngineConfig,
    variant: StudentVariant,
    builder: EngineBuilder,
    measured: Mapping[str, Any] | None,
) -> None:
    """The student's ONNX file for a runtime, how it is built on the device, and the engine.

    ``measured`` is the row of the engine that was built for measuring; None without one.
    """
    from edgekd.engines.tensorrt import where_built

    name = (
        engine.name.replace(":", ".") if isinstance(engine, ExternalEngineConfig) else engine.kind
    )
    folder = context.out / FURTHER / name
    folder.mkdir(parents=True)
    shutil.copyfile(variant.file, folder / STUDENT)
    record: dict[str, Any] = {
        "kind": engine.kind,
        "from": variant.name,
        "precision": variant.precision,
        "measured": measured is not None,
    }
    if isinstance(builder, TensorRTBuilder):
        record["command"] = builder.command(STUDENT, variant.precision, variant.kept)
    out = folder / f"student-built{builder.suffix}"
    if measured is not None:
        shutil.copyfile(context.out / measured["file"], out)
        record["engine"] = dict(measured)
    elif where_built(engine.kind, context.job.profile) == "here":
        record["engine"] = builder.build(folder / STUDENT, out, variant.precision, variant.kept)
        message = f"built from {variant.name}, {out.stat().st_size:,} bytes; not run here"
        context.progress.message(f"  {engine.kind}: {message}")
    else:
        message = f"for {context.job.profile.name} is built there: {record['command']}"
        context.progress.message(f"  {engine.kind}: {message}")
    write_json(folder / "build.json", record, FURTHER_SCHEMA)
