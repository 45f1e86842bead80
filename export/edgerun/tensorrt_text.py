"""The record of a build as plain text for a terminal."""

from __future__ import annotations

from typing import Any, Iterator, Mapping


def build_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """What was built, for what, and what its layers compute in."""
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
