"""The benchmark: latency, memory and environment of one model, or of two interleaved."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from edgerun.errors import BadInput, EdgerunError
from edgerun.files import describe_files, is_engine
from edgerun.inputs import Feed, Feeds, feeds_from, make_feeds
from edgerun.manifest import manifest_beside
from edgerun.memory import model_memory
from edgerun.model import LoadedModel, Settings
from edgerun.percentiles import PERCENTILES, summarize
from edgerun.run import open_model
from edgerun.system import describe_environment, read_conditions
from edgerun.timing import Stopwatch, WarmUp, compare, device_times, timed_rounds

SCHEMA = "edgerun.bench/1"
WARM_UP_SHARE = 0.25
DEVICE_SHARE = 0.25
"""A warm-up may take at most this share of the seconds allowed for timing, and so may the pass
that times an engine's queries on the GPU alone."""


@dataclass(frozen=True)
class BenchOptions:
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


def bench(config: BenchOptions) -> dict[str, Any]:
    """Measure and return the record of schema ``edgerun.bench/1``; times in ms, memory in MB.

    Everything that would disturb the timing (hashing, memory, profiling) is done afterwards.

    Raises:
        BadInput: a model, an input or a shape is wrong.
        RunFailed: the runtime cannot run a model.
    """
    models = [open_model(path, config.settings_of(i)) for i, path in enumerate(config.models)]
    watches = [Stopwatch(model, feeds) for model, feeds in zip(models, _feeds(config, models))]
    for watch in watches:
        watch.check()
    before = read_conditions()
    warm_ups = [watch.warm_up(config.max_seconds * WARM_UP_SHARE) for watch in watches]
    rounds = timed_rounds(watches, warm_ups, config.min_queries, config.max_seconds)
    after = read_conditions()
    limit = config.max_seconds * DEVICE_SHARE
    on_device = [device_times(watch, config.min_queries, limit) for watch in watches]
    return {
        "schema": SCHEMA,
        "models": [
            _record(config.settings_of(index), config.memory, *measured)
            for index, measured in enumerate(zip(watches, warm_ups, rounds, on_device))
        ],
        "comparison": compare(*rounds) if len(rounds) == 2 else None,
        "settings": {
            "threads": config.settings.threads,
            "optimization": config.settings.optimization,
            "min_queries": config.min_queries,
            "max_seconds": config.max_seconds,
        },
        "environment": {**describe_environment(), "before": before, "after": after},
    }


def _feeds(config: BenchOptions, models: Sequence[LoadedModel]) -> list[Feeds]:
    if config.inputs is not None:
        if config.shapes:
            raise BadInput(
                "shapes are for random inputs; the file's arrays have their own",
                where="--shape",
                remedy="leave out --shape or --inputs",
            )
        return [
            feeds_from(config.inputs, model.inputs, config.batch, manifest_beside(model.path))
            for model in models
        ]
    shapes = config.shapes or {}
    known = {tensor.name for model in models for tensor in model.inputs}
    for name in shapes:
        if name not in known:
            raise BadInput(
                f"there is no input {name!r}",
                where="--shape",
                remedy=f"the inputs are: {', '.join(str(t) for m in models for t in m.inputs)}",
            )
    return [make_feeds(model.inputs, shapes, config.batch, config.seed) for model in models]


def _record(
    settings: Settings,
    memory: bool,
    watch: Stopwatch,
    warm_up: WarmUp,
    rounds: Sequence[Sequence[float]],
    device: Sequence[float] | None,
) -> dict[str, Any]:
    model, feed = watch.model, watch.feeds.feeds[0]
    engine = is_engine(model.path)
    samples = [round(ms, 6) for block in rounds for ms in block]
    options = {name: dict(given) for name, given in settings.provider_options.items()}
    return {
        "path": str(model.path),
        **describe_files(model.path),
        "inputs": [tensor.to_json() for tensor in model.inputs],
        "outputs": [tensor.to_json() for tensor in model.outputs],
        "fed": watch.feeds.to_json(),
        "providers": {
            "requested": [] if engine else list(settings.providers),
            "session": list(model.providers),
            "options": {} if engine else options,
            "nodes": provider_nodes(model.path, settings, feed),
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
        "memory": model_memory(model, settings, feed) if memory else None,
    }


def provider_nodes(model: Path, settings: Settings, feed: Feed) -> dict[str, int] | None:
    """Provider → number of nodes that it ran for one feed.

    Nodes inside a branch that was not taken are not counted; a subgraph that a provider compiled
    into one node counts as one. None where the runtime gives no profile, and for an engine,
    which has no nodes. A profiled session is slower, so it is never the timed one.
    """
    if is_engine(model):
        return None
    from edgerun.onnx_session import RUNTIME_ERRORS, OrtSession

    no_profile: tuple[type[Exception], ...] = (EdgerunError, OSError, ValueError, *RUNTIME_ERRORS)
    with tempfile.TemporaryDirectory(prefix="edgerun-") as folder:
        try:
            profiled = OrtSession(model, settings, profile_to=Path(folder) / "profile")
            profiled.run(feed)
            events = json.loads(Path(profiled.session.end_profiling()).read_text("utf-8"))
        except no_profile:
            # The figures are valid without it: the assignment is reported as "not known".
            return None
    nodes: dict[str, set[str]] = {}
    for event in events:
        provider = event.get("args", {}).get("provider")
        if event.get("cat") == "Node" and provider:
            nodes.setdefault(provider, set()).add(event["name"])
    return {provider: len(names) for provider, names in nodes.items()} or None


def engine_precisions(model: LoadedModel) -> dict[str, int] | None:
    """Precision → number of an engine's layers that compute in it; None for an ONNX file.

    None, too, where the inspector has no types: an engine built without detail has only names.
    Never run: loading an engine needs a GPU.
    """
    if model.information is None:
        return None
    from edgerun.tensorrt.layers import engine_layers

    try:
        layers = json.loads(model.information()).get("Layers", [])
    except (ValueError, AttributeError):
        return None
    return dict(engine_layers(layers, ()).by_precision) or None


def bench_lines(record: dict[str, Any]) -> Iterator[str]:
    """A few lines for each model, then the comparison."""
    for model in record["models"]:
        yield f"{model['path']}  {model['size_bytes'] / 1e6:.3f} MB"
        for name, fed in model["fed"]["inputs"].items():
            shape = "x".join(map(str, fed["shape"])) or "scalar"
            note = f"  ({fed['note']})" if fed["note"] else ""
            yield f"  input {name} {fed['dtype']} {shape}{note}"
        if not model["warmup"]["steady"]:
            yield "  NOT STEADY: latency still changed when the warm-up ended"
        for name in PERCENTILES:
            yield f"  {name.replace('_', '.'):6} {_percentile(model['latency'][name])}"
        if model["memory"]:
            yield f"  peak memory {_memory(model['memory'])}"
    comparison = record["comparison"]
    if comparison:
        interval = comparison["interval"]
        bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else " (too few rounds)"
        rounds = f"over {comparison['rounds']} rounds"
        yield f"second / first: {comparison['ratio']:.3f}x{bounds} {rounds}"


def _percentile(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return str(figure["note"])
    interval = figure["interval"]
    bounds = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f"{figure['value']:.4f} ms{bounds}"


def _memory(memory: dict[str, Any]) -> str:
    if memory["above_empty_mb"] is None:
        return "not known"
    return f"{memory['peak_mb']:.1f} MB, {memory['above_empty_mb']:.1f} MB above an empty process"
