"""The report's tables about the student's engines: what was tried, measured and chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.figure import Figure
from edgekd.release.figure_text import ABSENT, drop_unit, full_text, value_text

MOST_SENSITIVE = 5
"""Layers that are listed by their sensitivity to INT8."""


def candidate_rows(choice: Mapping[str, Any], metric: str) -> list[dict[str, str]]:
    """One row per engine of the student that was measured; none when there was no choice.

    Args:
        choice: the content of ``choice.json``, or empty.
        metric: the metric that the drop is one of.
    """
    rows = choice.get("candidates", ())
    refused = choice.get("refused", {})
    if len(rows) < 2 and not refused:
        return []
    unit = choice.get("drop_unit") or drop_unit(metric)
    found = []
    for row in rows:
        is_float = row["speedup"] is None and row["name"] == choice["candidates"][0]["name"]
        drop = Figure(row["drop"], unit, interval=_ends(row["drop_interval"]))
        speedup = Figure(row["speedup"], "×", interval=_ends(row["speedup_interval"]))
        told = [f"misses {miss}" for miss in row["misses"]] + row["against"] + row["notes"]
        taken = ["taken"] if row["name"] == choice["chosen"] else []
        found.append(
            {
                "name": row["name"],
                "size": value_text(Figure(row["size_bytes"] / 1e6, "MB")),
                "drop": ABSENT if is_float else full_text(drop),
                "p50": value_text(Figure(row["latency_ms"].get("p50"), "ms")),
                "speedup": full_text(speedup) if row["speedup"] is not None else ABSENT,
                "found": "; ".join(taken + told),
            }
        )
    blank = dict.fromkeys(("size", "drop", "p50", "speedup"), ABSENT)
    found += [{"name": name, **blank, "found": reason} for name, reason in refused.items()]
    return found


def quantized_rows(index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the quantize stage says of each way it tried, for the report, by title."""
    return {f"Quantized: {name}": _quantized(entry) for name, entry in index.items()}


def _quantized(entry: Mapping[str, Any]) -> dict[str, Any]:
    decision = entry.get("decision")
    found: dict[str, Any] = {"method": entry["method"]}
    if "drop" in entry:
        unit = entry.get("drop_unit")
        dropped = round(entry["drop"], 5)
        found["drop on validation against float32"] = (
            dropped if unit in (None, "points") else value_text(Figure(entry["drop"], unit))
        )
    if entry.get("kept"):
        found["layers in float32"] = ", ".join(entry["kept"])
    if decision is not None:
        whole = decision["drop_all"]
        found["drop with every layer in INT8"] = "not finite" if whole is None else round(whole, 5)
        found["drop allowed"] = decision["budget"]
        found["files measured"] = decision["evaluations"]
        ranked = [row for row in decision["rows"] if row["sensitivity"] is not None]
        for row in sorted(ranked, key=lambda row: -row["sensitivity"])[:MOST_SENSITIVE]:
            stays = " (float32)" if row["kept"] else ""
            key = f"sensitivity of {row['node']}{stays}, {decision['measure']}"
            found[key] = f"{row['sensitivity']:.4g}"
    for error in entry.get("errors", ()):
        parts = [f"SQNR {error['sqnr_db']:.1f} dB"] if error["sqnr_db"] is not None else []
        if error["cosine"] is not None:
            parts.append(f"cosine {error['cosine']:.5f}")
        if error["argmax_agreement"] is not None:
            parts.append(f"same class {error['argmax_agreement']:.2%}")
        found[f"output {error['name']}"] = ", ".join(parts) or "not finite"
    if "refused" in entry:
        found["refused"] = entry["refused"]
    return found


def _ends(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None
