"""The report: HTML, Markdown summary, tables of engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from edgekd.measurement import ABSENT, Measurement, drop_unit, full_text, markdown_text, value_text
from edgekd.release.charts import charts_of
from edgekd.release.gate import Verdict, passed, summary_line
from edgekd.release.report_tables import (
    Cell,
    cautions,
    comparison_remarks,
    comparison_rows,
    flat_rows,
    gate_rows,
    headline,
    key_figures,
    parity_rows,
    recipe_rows,
    result_table,
    run_rows,
    verdict_word,
)
from edgekd.release.result import Result
from edgekd.release.student_search import search_section

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
        drop = Measurement(row["drop"], unit, interval=_ends(row["drop_interval"]))
        speedup = Measurement(row["speedup"], "×", interval=_ends(row["speedup_interval"]))
        reasons = [f"misses {miss}" for miss in row["misses"]] + row["against"] + row["notes"]
        shipped = ["shipped"] if row["name"] == choice["chosen"] else []
        found.append(
            {
                "name": row["name"],
                "size": value_text(Measurement(row["size_bytes"] / 1e6, "MB")),
                "drop": ABSENT if is_float else full_text(drop),
                "p50": value_text(Measurement(row["latency_ms"].get("p50"), "ms")),
                "speedup": full_text(speedup) if row["speedup"] is not None else ABSENT,
                "found": "; ".join(shipped + reasons),
            }
        )
    blank = dict.fromkeys(("size", "drop", "p50", "speedup"), ABSENT)
    found += [{"name": name, **blank, "found": reason} for name, reason in refused.items()]
    return found


def quantized_rows(index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The quantize stage's results for each method, for the report, by title."""
    return {f"Quantized: {name}": _quantized(entry) for name, entry in index.items()}


def _quantized(entry: Mapping[str, Any]) -> dict[str, Any]:
    decision = entry.get("decision")
    found: dict[str, Any] = {"method": entry["method"]}
    if "drop" in entry:
        unit = entry.get("drop_unit")
        dropped = round(entry["drop"], 5)
        found["drop on validation against float32"] = (
            dropped if unit in (None, "points") else value_text(Measurement(entry["drop"], unit))
        )
    if entry.get("kept"):
        found["layers in float32"] = ", ".join(entry["kept"])
    if decision is not None:
        drop = decision["drop_all"]
        found["drop with every layer in INT8"] = "not finite" if drop is None else round(drop, 5)
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


_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "⚠️ inconclusive"}


def summary_markdown(
    result: Result, verdicts: Sequence[Verdict], students: Mapping[str, Any] | None = None
) -> str:
    """Verdict, gate table, result table and comparisons as GitHub-flavoured Markdown.

    ``students`` is the content of ``comparison.json``.
    """
    students = students or {}
    remarks = [*cautions(result), *comparison_remarks(students)]
    line = summary_line(verdicts) if verdicts else "nothing was gated"
    parts = [
        f"## {markdown_text(result.name)}: {verdict_word(verdicts)}",
        "",
        markdown_text(headline(result)),
        "",
        f"Gate: {line}. Profile {markdown_text(result.profile)}, "
        f"target {markdown_text(result.target)}, evidence {result.evidence}.",
        "",
    ]
    parts += [f"> {markdown_text(remark)}" for remark in remarks]
    if verdicts:
        parts += ["", "| rule | verdict | figure | budget | why |", "|---|---|---|---|---|"]
        for rule in gate_rows(verdicts):
            budget = rule["budget"] + (f" ({rule['origin']})" if rule["origin"] else "")
            status = _MARKS[rule["status"]]
            parts.append(_line((rule["rule"], status, rule["figure"], budget, rule["reason"])))
    headings, rows = result_table(result, students.get("kept") == "baseline")
    parts += ["", _line(["", *headings]), "|---|" + "---:|" * len(headings)]
    parts += [_line([row.label, *(_cell(cell) for cell in row.cells)]) for row in rows]
    compared = comparison_rows(result)
    if compared:
        parts += ["", "| compared | value (95 % interval) | n |", "|---|---:|---:|"]
        for row in compared:
            parts.append(_line((row.label, _cell(row.cells[0]), row.cells[0].n)))
    return "\n".join(parts) + "\n"


def _cell(cell: Cell) -> str:
    return f"{cell.value} ({cell.detail})" if cell.detail else cell.value


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


SCHEMA = "edgekd.report/2"

_TEMPLATE = "report.html.jinja"


def write_report(
    folder: Path,
    result: Result,
    verdicts: Sequence[Verdict],
    histories: Mapping[str, Mapping[str, Any] | None],
    pipeline: Mapping[str, Any],
    extras: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``summary.md``.

    Args:
        folder: an existing folder.
        result: of the benchmark stage.
        verdicts: of the gate; may be empty, and the report then states that nothing was gated.
        histories: training histories by role (``teacher``, ``baseline``, ``student``); a role
            that was not trained here is absent or None.
        pipeline: the configuration as JSON values.
        extras: more tables by title; ``parity`` maps a role to its parity report, ``choice`` is
            that of the engines stage, ``search`` that of a search for the student, ``comparison``
            and ``recipes`` the distill stage's records.

    Returns:
        The three files.
    """
    trained = {role: history for role, history in histories.items() if history}
    more = dict(extras or {})
    choice, search = more.pop("choice", {}), more.pop("search", None)
    students, recipes = more.pop("comparison", {}), more.pop("recipes", {})
    page = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            result=result,
            headline=headline(result),
            verdict_line=summary_line(verdicts) if verdicts else "Nothing was gated",
            passed=passed(verdicts),
            gated=bool(verdicts),
            cautions=[*cautions(result), *comparison_remarks(students)],
            key_figures=key_figures(result),
            table=result_table(result, students.get("kept") == "baseline"),
            students=students,
            recipes=recipe_rows(recipes),
            recipes_why=recipes.get("why", ""),
            comparison=comparison_rows(result),
            gate=gate_rows(verdicts),
            candidates=candidate_rows(choice, result.metric),
            choice_line=f"{choice.get('chosen')} is shipped: {choice.get('reason')}.",
            search=search_section(search) if search else None,
            charts=charts_of(result, trained),
            parity=parity_rows(more.pop("parity", {})),
            environment=flat_rows(result.environment),
            runs=run_rows(result),
            versions=flat_rows(result.versions),
            fingerprints=flat_rows(result.fingerprints),
            extras={title: flat_rows(content) for title, content in more.items()},
            pipeline=yaml.safe_dump(
                json.loads(json.dumps(pipeline)), sort_keys=False, allow_unicode=True, width=88
            ),
        )
    )
    files = {
        "report.html": page,
        "report.json": json.dumps(
            {
                "schema": SCHEMA,
                "passed": passed(verdicts),
                "result": _without_samples(result.to_json()),
                "verdicts": [verdict.to_json() for verdict in verdicts],
                "histories": trained,
                "pipeline": pipeline,
                "extras": dict(extras or {}),
            },
            indent=1,
        )
        + "\n",
        "summary.md": summary_markdown(result, verdicts, students),
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in files]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _without_samples(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result without the raw queries, which are in the result file only."""
    models = {
        role: {key: value for key, value in model.items() if key != "samples_ms"}
        for role, model in result["models"].items()
    }
    return {**result, "models": models}
