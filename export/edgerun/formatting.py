"""Records as lines of text."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from edgerun.percentiles import PERCENTILES


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


def description_lines(value: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested keys and values, one a line; unknown values are shown as "not known"."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield f"{indent}{key}:"
            yield from description_lines(item, indent + "  ")
        elif isinstance(item, list):
            yield f"{indent}{key}: {', '.join(map(str, item))}"
        else:
            yield f"{indent}{key}: {'not known' if item is None else item}"


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


def build_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines about a built engine: its target and the precision of its layers."""
    engine, layers = record["engine"], record["layers"]
    yield (
        f"{engine['path']}  {engine['bytes'] / 1e6:.3f} MB  "
        f"{record['library']} {record['version']}  {record['seconds']:.2f} s"
    )
    if record["compute_capabilities"]:
        yield f"  for SM {', '.join(record['compute_capabilities'])}"
    for name, sizes in record["profile"].items():
        shapes = ["x".join(map(str, sizes[key])) for key in ("min", "usual", "max")]
        yield f"  input {name} {' : '.join(shapes)}"
    counts = ", ".join(f"{n} {precision}" for precision, n in layers["by_precision"].items())
    sure = "" if layers["certain"] else " (of the model; the builder may have chosen others)"
    yield f"  layers: {counts or 'none'}{sure}"
    if not record["inspected"]:
        yield f"  the engine was not loaded here: {record['reason']}"
    cache = record["timing_cache"]
    if cache is not None:
        why = f": {cache['reason']}" if cache["reason"] else ""
        yield f"  timing cache {cache['state']}{why}"
    for warning in record["warnings"]:
        yield f"  {record['library']} warns: {warning}"
