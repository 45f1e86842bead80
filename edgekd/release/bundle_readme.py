"""The README of a bundle: what it is, and the lines that run it on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.figure import Figure
from edgekd.release.figure_text import full_text, value_text


def readme_text(manifest: Mapping[str, Any]) -> str:
    """The README for the content of a manifest."""
    name, figures = manifest["name"], manifest["figures"]
    parts = [
        f"# {name}",
        "",
        f"A {manifest['task']['name']} model in ONNX, with what runs and checks it. It needs "
        "Python 3.8 or newer, numpy and onnxruntime; nothing else.",
        "",
        "```sh",
        "python -m pip install -r requirements.txt      # numpy onnxruntime",
        "python -m edgerun verify .                     # every file is what was packed",
        "python -m edgerun run model.onnx --inputs example.npz --output ../answers.npz",
        "```",
        "",
        "Run them in this folder; what they write lies beside it, so that the bundle stays as it "
        "is. The answers to `example.npz` (real samples) were, when this "
        "was packed, those in `expected.npz`:",
        "",
        "```sh",
        "python -c \"import numpy as n; a, e = n.load('../answers.npz'), n.load('expected.npz'); "
        'print({k: float(abs(a[k] - e[k]).max()) for k in e})"   # near 0',
        "python -m edgerun bench model.onnx --inputs example.npz --json ../bench.json",
        "```",
        "",
        "## Inputs and outputs",
        "",
        "| | name | dtype | shape |",
        "|---|---|---|---|",
    ]
    for kind in ("inputs", "outputs"):
        for tensor in manifest[kind]:
            shape = " × ".join(map(str, tensor["shape"]))
            parts.append(f"| {kind[:-1]} | `{tensor['name']}` | {tensor['dtype']} | {shape} |")
    parts += [
        "",
        "Give raw `uint8` data and `edgerun` prepares it with the constants in `manifest.json`, "
        "`(x · scale − mean) / std`; `float32` data is taken as prepared already.",
    ]
    if manifest["labels"]:
        labels = ", ".join(map(str, manifest["labels"][:20]))
        more = " …" if len(manifest["labels"]) > 20 else ""
        parts += [
            "",
            f"Classes, in the order of the outputs: {labels}{more} (all in the manifest).",
        ]
    parts += _engine_lines(manifest.get("engines") or {})
    parts += ["", "## Figures", "", *_figure_rows(figures)]
    return "\n".join(parts) + "\n"


def _engine_lines(engines: Mapping[str, Any]) -> list[str]:
    """How each further engine is built on the device; edgerun needs its runtime there."""
    if not engines:
        return []
    lines = ["", "## Engines of other runtimes", ""]
    for kind, build in engines.items():
        figures = (
            "The figures below are those of its engine."
            if build["measured"]
            else "Its figures are not those below: it was not measured."
        )
        lines.append(
            f"`engines/{kind}` holds the student made for {kind} ({build['from']}). {figures}"
        )
        if build["command"]:
            lines += [
                "Build it on the device, in that folder:",
                "",
                "```sh",
                f"PYTHONPATH=../.. {build['command']}",
                "```",
                "",
            ]
    return lines


def _figure_rows(figures: Mapping[str, Any]) -> list[str]:
    student = figures["student"]
    latency = student.get("latency") or {}
    rows = [
        (figures["task"]["metric"], student.get("metric")),
        ("size", student.get("size_mb")),
        ("parameters", student.get("parameters")),
        ("latency p50", latency.get("p50_ms")),
        ("latency p95", latency.get("p95_ms")),
        ("peak memory above an empty process", student.get("peak_memory_mb")),
    ]
    lines = ["| figure | value (95 % interval) | n | evidence |", "|---|---|---|---|"]
    for label, value in rows:
        if value is not None:
            figure = Figure.from_json(value)
            text = full_text(figure) if figure.value is not None else value_text(figure)
            lines.append(f"| {label} | {text} | {figure.n:,} | {figure.evidence} |")
    return [*lines, "", f"Profile: {figures['profile']}; measured on target: {figures['target']}."]
