"""The benchmark: latency, memory and environment of one model, or of two interleaved."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from edgerun.contention import Contention
from edgerun.errors import EdgerunError
from edgerun.files import describe_files, is_engine
from edgerun.inputs import Feed, Feeds
from edgerun.memory import model_memory, runtime_of
from edgerun.model import LoadedModel, Settings
from edgerun.percentiles import PERCENTILES, summarize
from edgerun.run import open_model
from edgerun.system import describe_environment, read_conditions
from edgerun.timed_process import (
    BenchOptions,
    Share,
    TimedProcess,
    make_all_feeds,
    run_timed_process,
)
from edgerun.timing import ROUNDS, Stopwatch, compare

__all__ = ["BenchOptions", "bench", "bench_lines", "engine_precisions", "provider_nodes"]

SCHEMA = "edgerun.bench/1"
WIDTH = 0.05
RATIO_WIDTH = 0.025
"""Half of an interval's width relative to its value, p50's or a ratio's, above which processes are
added, and above which the figures are not steady."""
START_SECONDS = 0.2
"""What a process costs before it opens a model: a shorter time limit has fewer processes."""
GROWTH = 3
"""At most so many times the least number of processes."""


def bench(config: BenchOptions) -> dict[str, Any]:
    """Measure and return the record of schema ``edgerun.bench/1``; times in ms, memory in MB.

    The models are timed in several fresh processes, one after the other. Processes are added
    until the intervals of p50 and of the ratio are narrow, or each budget is outside its interval,
    unless the time is over; on a busy machine for the ratio alone. Everything that would disturb
    the timing (hashing, memory, profiling) is done afterwards.

    Raises:
        BadInput: a model, an input or a shape is wrong.
        RunFailed: the runtime cannot run a model.
    """
    described, seconds = _describe(config)
    before = read_conditions()
    processes = _timed_processes(config, seconds)
    after = read_conditions()
    records = [_record(config, index, each, processes) for index, each in enumerate(described)]
    rounds = [[p.models[i].rounds for p in processes] for i in range(len(records))]
    comparison = compare(*rounds) if len(rounds) == 2 else None
    environment = {**describe_environment(), "before": before, "after": after}
    return {
        "schema": SCHEMA,
        "models": records,
        "comparison": comparison,
        "processes": [process.to_json() for process in processes],
        "steadiness": _steadiness(config, processes, records, comparison, environment),
        "settings": {
            "threads": config.settings.threads,
            "optimization": config.settings.optimization,
            "min_queries": config.min_queries,
            "max_seconds": config.max_seconds,
            "processes": config.processes,
            "budgets": dict(config.budgets),
        },
        "environment": environment,
    }


@dataclass(frozen=True)
class _Described:
    """A model that was opened once, checked, and closed before anything was timed."""

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    feeds: Feeds
    providers: tuple[str, ...]
    precisions: dict[str, int] | None
    runtime: tuple[str, ...]


def _describe(config: BenchOptions) -> tuple[list[_Described], float]:
    """The models, and the seconds that a process needs at least: to open them and for two queries
    of each.
    """
    begin = time.perf_counter()
    models = [open_model(path, config.settings_of(i)) for i, path in enumerate(config.models)]
    all_feeds = make_all_feeds(config, models)
    for model, feeds in zip(models, all_feeds):
        # A feed that does not fit is a clear error before any timing.
        Stopwatch(model, feeds).check()
    seconds = time.perf_counter() - begin
    described = [
        _Described(
            inputs=[tensor.to_json() for tensor in model.inputs],
            outputs=[tensor.to_json() for tensor in model.outputs],
            feeds=feeds,
            providers=model.providers,
            precisions=engine_precisions(model),
            runtime=runtime_of(model.path, model.providers),
        )
        for model, feeds in zip(models, all_feeds)
    ]
    return described, seconds


def _timed_processes(config: BenchOptions, least_seconds: float) -> list[TimedProcess]:
    """The processes one after the other, as many as it takes.

    Where the time is too short for that, or the model so slow that to open it and to run it once
    takes longer than the time of one process, there are fewer, but two.
    """
    affordable = int(config.max_seconds / max(least_seconds, START_SECONDS))
    fewest = min(config.processes, max(2, affordable))
    most = max(fewest, config.max_processes or GROWTH * config.processes)
    share = Share(
        queries=math.ceil(config.min_queries / fewest),
        rounds=math.ceil(ROUNDS / fewest),
        seconds=config.max_seconds / fewest,
    )
    processes: list[TimedProcess] = []
    begin = time.perf_counter()
    while len(processes) < most:
        turned = len(processes) % 2 == 1
        processes.append(run_timed_process(config, replace(share, turned=turned)))
        count, elapsed = len(processes), time.perf_counter() - begin
        if count < fewest:
            continue
        if elapsed * (count + 1) / count > config.max_seconds:
            break
        undecided = _undecided(config, processes)
        if Contention.mean([p.contention for p in processes]).reason:
            # More of them would be as busy; in a ratio the load cancels.
            undecided &= {"speedup"}
        if not undecided:
            break
    return processes


def _undecided(config: BenchOptions, processes: Sequence[TimedProcess]) -> set[str]:
    """The figures for which more processes are needed: percentiles, and ``speedup``."""
    by_model = [[p.models[i] for p in processes] for i in range(len(config.models))]
    summaries = [summarize(*(model.samples for model in models)) for models in by_model]
    figures: dict[str, Mapping[str, Any]] = {name: summaries[0][name] for name in PERCENTILES}
    if len(by_model) == 2:
        ratio = compare(*([model.rounds for model in models] for models in by_model))
        figures["speedup"] = {"value": ratio["ratio"], "interval": ratio["interval"]}
    if config.budgets:
        intervals = {name: figures[name]["interval"] for name in config.budgets if name in figures}
        return {
            name
            for name, interval in intervals.items()
            if interval is not None and interval[0] <= config.budgets[name] <= interval[1]
        }
    wide = {"speedup"} if _half_width(figures.get("speedup")) > RATIO_WIDTH else set()
    return wide | ({"p50"} if any(_half_width(s["p50"]) > WIDTH for s in summaries) else set())


def _half_width(figure: Mapping[str, Any] | None) -> float:
    """Half of an interval's width relative to the value; 0 without an interval."""
    if figure is None or figure["value"] is None or figure["interval"] is None:
        return 0.0
    low, high = figure["interval"]
    return float((high - low) / 2 / figure["value"])


def _steadiness(
    config: BenchOptions,
    processes: Sequence[TimedProcess],
    records: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any] | None,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Whether the figures may be expected again, and the reasons where they may not."""
    contention = Contention.mean([process.contention for process in processes])
    reasons = [contention.reason] if contention.reason else []
    if environment["before"]["throttling"] != environment["after"]["throttling"]:
        reasons.append("the machine throttled during the measurement")
    decided = bool(config.budgets) and not _undecided(config, processes)
    for record in records:
        name, unsteady = Path(record["path"]).name, record["warmup"]["processes_not_steady"]
        if 2 * unsteady > len(processes):
            reasons.append(
                f"the latency of {name} was still changing when the warm-up ended, in {unsteady} "
                f"of {len(processes)} processes"
            )
        width = _half_width(record["latency"]["p50"])
        if width > WIDTH and not decided:
            reasons.append(f"the p50 of {name} differs from process to process: ±{width:.0%}")
    clocks = [p.clock_mhz for p in processes if p.clock_mhz]
    if reasons and clocks and min(clocks) < (1 - WIDTH) * max(clocks):
        reasons.append(f"the clock was between {min(clocks):.0f} and {max(clocks):.0f} MHz")
    return {"steady": not reasons, "reasons": reasons, "contention": contention.to_json()}


def _record(
    config: BenchOptions, index: int, model: _Described, processes: Sequence[TimedProcess]
) -> dict[str, Any]:
    path, settings, feed = config.models[index], config.settings_of(index), model.feeds.feeds[0]
    engine = is_engine(path)
    timed = [process.models[index] for process in processes]
    options = {name: dict(given) for name, given in settings.provider_options.items()}
    device = [each.device for each in timed if each.device is not None]
    return {
        "path": str(path),
        **describe_files(path),
        "inputs": model.inputs,
        "outputs": model.outputs,
        "fed": model.feeds.to_json(),
        "providers": {
            "requested": [] if engine else list(settings.providers),
            "session": list(model.providers),
            "options": {} if engine else options,
            "nodes": provider_nodes(path, settings, feed),
            "precisions": model.precisions,
        },
        "threads": settings.threads,
        "load_ms": _cold([each.load_ms for each in timed])["value"],
        "load": _cold([each.load_ms for each in timed]),
        "first": _cold([each.first_ms for each in timed]),
        "warmup": _warm_up([each.warmup for each in timed]),
        "samples_ms": [ms for each in timed for ms in each.samples],
        "queries_per_process": [len(each.samples) for each in timed],
        "queries_per_round": len(timed[0].rounds[0]),
        "latency": summarize(*(each.samples for each in timed)),
        # In addition to the latency, which includes the copies to the GPU and back.
        "device_ms": {"copies": False, **summarize(*device)} if device else None,
        "memory": model_memory(path, model.runtime, settings, feed) if config.memory else None,
    }


def _cold(times: Sequence[float]) -> dict[str, Any]:
    """The median over the processes, in ms, and the range."""
    value = round(statistics.median(times), 6)
    return {"value": value, "range": [min(times), max(times)], "n": len(times)}


def _warm_up(warm_ups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All processes' warm-ups as one, steady where more than half of them were."""
    unsteady = sum(not each["steady"] for each in warm_ups)
    return {
        "queries": sum(each["queries"] for each in warm_ups),
        "windows": [window for each in warm_ups for window in each["windows"]],
        "steady": 2 * unsteady <= len(warm_ups),
        "processes_not_steady": unsteady,
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
        for name in PERCENTILES:
            yield f"  {name.replace('_', '.'):6} {_percentile(model['latency'][name])}"
        for name, what in (("load", "opening"), ("first", "first query")):
            low, high = model[name]["range"]
            yield f"  {what} {model[name]['value']:.3f} ms  ({low:.3f} to {high:.3f})"
        if model["memory"]:
            yield f"  peak memory {_memory(model['memory'])}"
    comparison = record["comparison"]
    if comparison:
        interval = comparison["interval"]
        bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else " (too few rounds)"
        yield f"second / first: {comparison['ratio']:.3f}x{bounds}"
    yield f"{len(record['processes'])} processes"
    for reason in record["steadiness"]["reasons"]:
        yield f"NOT STEADY: {reason}"


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
