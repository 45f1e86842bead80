"""The figures as Markdown, short enough for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from edgekd.release.report_tables import (
    Cell,
    cautions,
    comparison_rows,
    gate_rows,
    headline,
    result_table,
    verdict_word,
)
from edgekd.release.result import Result
from edgekd.release.verdict import Verdict, summary_line

_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "not shown": "⚠️ not shown"}


def summary_markdown(result: Result, verdicts: Sequence[Verdict]) -> str:
    """Verdict, gate table, result table and comparisons as GitHub-flavoured Markdown."""
    line = summary_line(verdicts) if verdicts else "nothing was gated"
    parts = [
        f"## {_plain(result.name)}: {verdict_word(verdicts)}",
        "",
        _plain(headline(result)),
        "",
        f"Gate: {line}. Profile {_plain(result.profile)}, target {_plain(result.target)}, "
        f"evidence {result.evidence}.",
        "",
    ]
    parts += [f"> {_plain(caution)}" for caution in cautions(result)]
    if verdicts:
        parts += ["", "| rule | verdict | figure | budget | why |", "|---|---|---|---|---|"]
        for rule in gate_rows(verdicts):
            budget = rule["budget"] + (f" ({rule['origin']})" if rule["origin"] else "")
            status = _MARKS[rule["status"]]
            parts.append(_line((rule["rule"], status, rule["figure"], budget, rule["reason"])))
    headings, rows = result_table(result)
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
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that stays in its table cell and is not taken for markup."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    return escaped.replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*").replace("`", "\\`")
