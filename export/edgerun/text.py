"""The benchmark's record and the machine's description as plain text for a terminal."""

from __future__ import annotations

from typing import Any, Iterator

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
    """Nested keys and values, one a line; what cannot be read is shown as "not known"."""
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
