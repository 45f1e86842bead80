"""Stage engines: the files that are really run, optimized for the profile's runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import write_json


class EnginesStage:
    """Writes ``<role>.onnx``, optimized offline, and ``engines.json`` with their settings."""

    name = "engines"
    inputs = ("export",)
    code = ("edgekd.stages.engines", "edgekd.engines")
    libraries = ("onnx", "onnxruntime")

    def config_slice(self, job: Job) -> dict[str, Any]:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        return {
            "engines": [engine.model_dump(mode="json") for engine in job.config.engines],
            "providers": list(job.profile.runtime.providers),
            "threads": job.profile.runtime.threads,
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.engines.onnx import describe_onnx
        from edgekd.engines.onnxruntime import build_engine, providers_for

        engine = context.job.config.engines[0]
        runtime = context.job.profile.runtime
        providers = providers_for(runtime.providers, engine.providers)
        threads = engine.threads or runtime.threads or 1
        rows = {}
        for exported in sorted(inputs["export"].glob("*.onnx")):
            path = context.out / exported.name
            info = build_engine(exported, path, providers, threads, engine.optimization)
            # Counted before optimization, which folds and fuses parameters away.
            parameters = describe_onnx(exported).parameters
            rows[exported.stem] = info.to_json() | {"parameters": parameters}
        write_json(context.out / "engines.json", rows)
        context.progress.message(f"  ONNX Runtime, {', '.join(providers)}, {threads} thread(s)")
