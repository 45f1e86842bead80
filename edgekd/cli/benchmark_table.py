"""The record of a benchmark as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgekd.release.figure_text import ABSENT, number

PERCENTILES = {"p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p99_9": "p99.9"}
_EVIDENCE = {
    "measured-on-target": "measured on the target itself",
    "measured-on-host": "measured on this machine, which only stands in for the profile's device",
}


def print_benchmark(console: Console, record: dict[str, Any]) -> None:
    """Print a record ``edgerun.bench/1`` with ``profile`` and ``evidence``: one column a model."""
    models = record["models"]
    table = Table(title="ms, 95 % interval in brackets", title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(Path(model["path"]).name, justify="right", overflow="fold")
    for key, title in PERCENTILES.items():
        table.add_row(title, *(_percentile(model["latency"][key]) for model in models))
    table.add_row("queries", *(f"{model['latency']['n']:,}" for model in models))
    table.add_row("warm-up", *(_warm_up(model["warmup"]) for model in models))
    table.add_row("load", *(f"{number(model['load_ms'])} ms" for model in models))
    table.add_row("peak memory", *(_memory(model["memory"]) for model in models))
    table.add_row("size", *(f"{model['size_bytes'] / 1e6:.3f} MB" for model in models))
    table.add_row("nodes run by", *(_nodes(model["providers"]) for model in models))
    console.print(table)
    for note in sorted({m["latency"][key]["note"] for m in models for key in PERCENTILES} - {""}):
        console.print(note, markup=False, highlight=False)
    for model in models:
        _print_inputs(console, model)
    if record["comparison"] is not None:
        _print_comparison(console, record)
    _print_machine(console, record)


def _percentile(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "n too small"
    if figure["interval"] is None:
        return number(figure["value"])
    low, high = figure["interval"]
    return f"{number(figure['value'])} \\[{number(low)}, {number(high)}]"


def _warm_up(warm_up: dict[str, Any]) -> str:
    state = "steady" if warm_up["steady"] else "[bold yellow]not steady[/]"
    return f"{state} after {warm_up['queries']:,}"


def _memory(memory: dict[str, Any] | None) -> str:
    if memory is None or memory["above_empty_mb"] is None:
        return ABSENT
    return f"{memory['above_empty_mb']:.1f} MB above empty ({memory['peak_mb']:.1f} in all)"


def _nodes(providers: dict[str, Any]) -> str:
    if providers["nodes"] is None:
        return "not known"
    return ", ".join(
        f"{name.removesuffix('ExecutionProvider')} {count}"
        for name, count in providers["nodes"].items()
    )


def _print_inputs(console: Console, model: dict[str, Any]) -> None:
    fed = model["fed"]
    console.print(f"{Path(model['path']).name}: inputs {fed['source']}", markup=False)
    for name, given in fed["inputs"].items():
        shape = " x ".join(map(str, given["shape"])) or "scalar"
        note = f"  ({given['note']})" if given["note"] not in ("", "declared") else ""
        line = f"  {name}: {given['dtype']} {shape}{note}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if fed.get("decides_work"):
        console.print(
            decided_text(fed["decides_work"]),
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def decided_text(decides: Mapping[str, str]) -> str:
    """That made-up values decide how much was computed, and what to do."""
    told = "; ".join(f"{name} decides {what}" for name, what in decides.items())
    return (
        f"  made-up values decide how much is computed, so that these times are of no real query: "
        f"{told}. Give real ones: --inputs DATA.npz"
    )


def _print_comparison(console: Console, record: dict[str, Any]) -> None:
    comparison = record["comparison"]
    first, second = (Path(model["path"]).name for model in record["models"])
    low, high = comparison["interval"]
    console.print(
        f"{second} takes {number(comparison['ratio'])} times the p50 of {first} "
        f"[{number(low)}, {number(high)}] ({comparison['rounds']} interleaved rounds)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_machine(console: Console, record: dict[str, Any]) -> None:
    environment = record["environment"]
    threads = record["settings"]["threads"]
    facts = [
        environment["device"] or environment["cpu"] or "unknown device",
        f"{threads} thread{'s' if threads != 1 else ''}",
        f"onnxruntime {environment['versions']['onnxruntime']}",
        f"governor {environment['governor'] or 'not known'}",
    ]
    console.print(", ".join(facts), markup=False, highlight=False)
    if record.get("providers_left_out"):
        console.print(
            f"[bold yellow]not on this machine, left out: "
            f"{', '.join(record['providers_left_out'])}[/]"
        )
    throttled = environment["before"]["throttling"] != environment["after"]["throttling"]
    if throttled:
        console.print("[bold yellow]the machine throttled during the measurement[/]")
    if not all(model["warmup"]["steady"] for model in record["models"]):
        console.print(
            "[bold yellow]latency was still changing when the warm-up ended: close other "
            "programs, fix the clocks, or allow more time (--max-seconds)[/]"
        )
    console.print(
        f"evidence: {record['evidence']} ({_EVIDENCE[record['evidence']]}; "
        f"profile {record['profile']})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
