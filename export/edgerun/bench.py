"""The benchmark: latency, memory and environment of one model, or of two interleaved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from edgerun.errors import BadInput
from edgerun.files import describe_files, is_engine
from edgerun.inputs import Feeds, feeds_from, make_feeds
from edgerun.manifest import manifest_beside
from edgerun.memory import empty_memory, model_memory, runtime_of
from edgerun.model import LoadedModel, Settings
from edgerun.model_loading import open_model
from edgerun.node_assignment import engine_precisions, provider_nodes
from edgerun.percentiles import summarize
from edgerun.sensors import read_conditions
from edgerun.system import describe_environment
from edgerun.timing import Stopwatch, WarmUp, compare, device_times, timed_rounds

SCHEMA = "edgerun.bench/1"
WARM_UP_SHARE = 0.25
DEVICE_SHARE = 0.25
"""A warm-up may take at most this share of the seconds allowed for timing, and so may the pass
that times an engine's queries on the GPU alone."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of a benchmark: what to measure and for how long.

    Attributes:
        models: one path, or two to compare.
        settings: settings for opening the models.
        against_settings: the second one's, where they differ.
        inputs: an npz file with the models' inputs; None makes random ones from ``seed``. Raw
            uint8 data is preprocessed by the manifest of the bundle that contains the model.
        shapes: sizes by input name, for random inputs.
        batch: samples of one query; None: the model's fixed batch, or 1.
        min_queries: timed queries of each model, unless ``max_seconds`` is reached first.
        memory: whether to measure peak memory, in separate processes.
    """

    models: tuple[Path, ...]
    settings: Settings
    inputs: Path | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    batch: int | None = None
    seed: int = 0
    min_queries: int = 1000
    max_seconds: float = 60.0
    memory: bool = True
    against_settings: Settings | None = None

    def settings_of(self, index: int) -> Settings:
        """The settings of the model at an index of ``models``."""
        return self.settings if index == 0 else self.against_settings or self.settings


def bench(plan: BenchmarkConfig) -> dict[str, Any]:
    """Measure and return the record of schema ``edgerun.bench/1``; times in ms, memory in MB.

    Everything that would disturb the timing (hashing, memory, profiling) is done afterwards.

    Raises:
        BadInput: a model, an input or a shape is wrong.
        RunFailed: the runtime cannot run a model.
    """
    models = [open_model(path, plan.settings_of(i)) for i, path in enumerate(plan.models)]
    watches = [Stopwatch(model, feeds) for model, feeds in zip(models, _feeds(plan, models))]
    for watch in watches:
        watch.check()
    before = read_conditions()
    warm_ups = [watch.warm_up(plan.max_seconds * WARM_UP_SHARE) for watch in watches]
    rounds = timed_rounds(watches, warm_ups, plan.min_queries, plan.max_seconds)
    after = read_conditions()
    limit = plan.max_seconds * DEVICE_SHARE
    on_device = [device_times(watch, plan.min_queries, limit) for watch in watches]
    empty = _empty(models) if plan.memory else {}
    return {
        "schema": SCHEMA,
        "models": [
            _record(plan, plan.settings_of(index), *measured, empty)
            for index, measured in enumerate(zip(watches, warm_ups, rounds, on_device))
        ],
        "comparison": compare(*rounds) if len(rounds) == 2 else None,
        "settings": {
            "threads": plan.settings.threads,
            "optimization": plan.settings.optimization,
            "min_queries": plan.min_queries,
            "max_seconds": plan.max_seconds,
        },
        "environment": {**describe_environment(), "before": before, "after": after},
    }


def _feeds(plan: BenchmarkConfig, models: Sequence[LoadedModel]) -> list[Feeds]:
    if plan.inputs is not None:
        if plan.shapes:
            raise BadInput(
                "shapes are for random inputs; the file's arrays have their own",
                where="--shape",
                remedy="leave out --shape or --inputs",
            )
        return [
            feeds_from(plan.inputs, model.inputs, plan.batch, manifest_beside(model.path))
            for model in models
        ]
    shapes = plan.shapes or {}
    known = {tensor.name for model in models for tensor in model.inputs}
    for name in shapes:
        if name not in known:
            raise BadInput(
                f"there is no input {name!r}",
                where="--shape",
                remedy=f"the inputs are: {', '.join(str(t) for m in models for t in m.inputs)}",
            )
    return [make_feeds(model.inputs, shapes, plan.batch, plan.seed) for model in models]


def _record(
    plan: BenchmarkConfig,
    settings: Settings,
    watch: Stopwatch,
    warm_up: WarmUp,
    rounds: Sequence[Sequence[float]],
    device: Sequence[float] | None,
    empty: Mapping[tuple[str, ...], float | None],
) -> dict[str, Any]:
    model, feeds = watch.model, watch.feeds
    engine = is_engine(model.path)
    samples = [round(ms, 6) for block in rounds for ms in block]
    return {
        "path": str(model.path),
        **describe_files(model.path),
        "inputs": [tensor.to_json() for tensor in model.inputs],
        "outputs": [tensor.to_json() for tensor in model.outputs],
        "fed": feeds.to_json(),
        "providers": {
            "requested": [] if engine else list(settings.providers),
            "session": list(model.providers),
            "options": {} if engine else _options(settings),
            "nodes": provider_nodes(model.path, settings, feeds.feeds[0]),
            "precisions": engine_precisions(model),
        },
        "threads": settings.threads,
        "load_ms": round(model.load_ms, 3),
        "warmup": warm_up.to_json(),
        "samples_ms": samples,
        "queries_per_round": len(rounds[0]),
        "latency": summarize(samples),
        # In addition to the latency, which includes the copies to the GPU and back.
        "device_ms": None if device is None else {"copies": False, **summarize(device)},
        "memory": _memory(model, settings, feeds, empty) if plan.memory else None,
    }


def _options(settings: Settings) -> dict[str, dict[str, str]]:
    return {name: dict(options) for name, options in settings.provider_options.items()}


def _empty(models: Sequence[LoadedModel]) -> dict[tuple[str, ...], float | None]:
    return {runtime: empty_memory(runtime) for runtime in {runtime_of(model) for model in models}}


def _memory(
    model: LoadedModel,
    settings: Settings,
    feeds: Feeds,
    empty: Mapping[tuple[str, ...], float | None],
) -> dict[str, Any]:
    return model_memory(model.path, settings, feeds.feeds[0], empty[runtime_of(model)])
