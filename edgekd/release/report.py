"""The report: one self-contained HTML page, the same figures as JSON, and a Markdown summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from edgekd.release.engine_tables import candidate_rows
from edgekd.release.report_charts import charts_of
from edgekd.release.report_tables import (
    cautions,
    comparison_rows,
    flat_rows,
    gate_rows,
    headline,
    key_figures,
    parity_rows,
    result_table,
    run_rows,
)
from edgekd.release.result import Result
from edgekd.release.summary import summary_markdown
from edgekd.release.verdict import Verdict, passed, summary_line

SCHEMA = "edgekd.report/1"
_TEMPLATE = "report.html.jinja"


def write_report(
    folder: Path,
    result: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    histories: Mapping[str, Mapping[str, Any] | None],
    pipeline: Mapping[str, Any],
    extras: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``summary.md``.

    Args:
        folder: an existing folder.
        result: the content of a result file.
        verdicts: of the gate; may be empty, and the report then says that nothing was gated.
        histories: training histories by role (``teacher``, ``baseline``, ``student``); a role
            that was not trained here is absent or None.
        pipeline: the configuration as JSON values.
        extras: more tables by title; ``parity`` maps a role to its parity report, ``choice`` is
            that of the engines stage.

    Returns:
        The three files.

    Raises:
        InputError: the result is not whole.
    """
    parsed = Result.from_json(result)
    trained = {role: history for role, history in histories.items() if history}
    more = dict(extras or {})
    choice = more.pop("choice", {})
    page = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            result=parsed,
            headline=headline(parsed),
            verdict_line=summary_line(verdicts) if verdicts else "Nothing was gated",
            passed=passed(verdicts),
            gated=bool(verdicts),
            cautions=cautions(parsed),
            key_figures=key_figures(parsed),
            table=result_table(parsed),
            comparison=comparison_rows(parsed),
            gate=gate_rows(verdicts),
            candidates=candidate_rows(choice, parsed.metric),
            choice_line=f"{choice.get('chosen')} is shipped: {choice.get('reason')}.",
            charts=charts_of(parsed, trained),
            parity=parity_rows(more.pop("parity", {})),
            environment=flat_rows(parsed.environment),
            runs=run_rows(parsed),
            versions=flat_rows(parsed.versions),
            fingerprints=flat_rows(parsed.fingerprints),
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
                "result": _without_samples(result),
                "verdicts": [verdict.to_json() for verdict in verdicts],
                "histories": trained,
                "pipeline": pipeline,
                "extras": dict(extras or {}),
            },
            indent=1,
        )
        + "\n",
        "summary.md": summary_markdown(parsed, verdicts),
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
    """The result without the raw queries, which stay in the result file."""
    models = {
        role: {key: value for key, value in model.items() if key != "samples_ms"}
        for role, model in result["models"].items()
    }
    return {**result, "models": models}
