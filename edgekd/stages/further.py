"""What is built on the device: the student's file for a runtime, its settings, and the engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from edgekd.config.engines import OnnxRuntimeConfig, TensorRTConfig
from edgekd.pipeline.stage import Context
from edgekd.stages.building import Builder, TensorRTBuilder
from edgekd.stages.fitting import write_json
from edgekd.stages.quantize import STUDENT
from edgekd.stages.ways import Way

FURTHER = "further"
"""The folder: for each TensorRT entry the student's ONNX file, its settings, and the engine where
it is built already; the same for further ONNX Runtime entries."""


def write_further(
    context: Context,
    engine: OnnxRuntimeConfig | TensorRTConfig,
    way: Way,
    builder: Builder,
    measured: Mapping[str, Any] | None,
) -> None:
    """The student's ONNX file for a runtime, how it is built on the device, and the engine.

    ``measured`` is the row of the engine that was built for measuring, None where none was.
    """
    from edgekd.engines.tensorrt import where_built

    folder = context.out / FURTHER / engine.kind
    folder.mkdir(parents=True)
    shutil.copyfile(way.file, folder / STUDENT)
    record: dict[str, Any] = {
        "kind": engine.kind,
        "from": way.name,
        "precision": way.precision,
        "measured": measured is not None,
    }
    if isinstance(builder, TensorRTBuilder):
        record["command"] = builder.command(STUDENT, way.precision, way.kept)
    out = folder / f"student-built{builder.suffix}"
    if measured is not None:
        shutil.copyfile(context.out / measured["file"], out)
        record["engine"] = dict(measured)
    elif where_built(engine.kind, context.job.profile) == "here":
        record["engine"] = builder.build(folder / STUDENT, out, way.precision, way.kept)
        told = f"built from {way.name}, {out.stat().st_size:,} bytes; not run here"
        context.progress.message(f"  {engine.kind}: {told}")
    else:
        told = f"for {context.job.profile.name} is built there: {record['command']}"
        context.progress.message(f"  {engine.kind}: {told}")
    write_json(folder / "build.json", record)
