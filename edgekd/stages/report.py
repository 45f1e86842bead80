"""Stage report: the figures as one HTML page, as JSON and as a summary for a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import read_json


class ReportStage:
    """Writes ``report.html``, ``report.json`` and ``summary.md``."""

    name = "report"
    inputs = ("teacher", "distill", "export", "benchmark", "gate")
    code = ("edgekd.stages.report", "edgekd.release")
    libraries = ("jinja2",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        return {"pipeline": job.config.model_dump(mode="json", exclude_defaults=True)}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.release.gate import read_gate
        from edgekd.release.report import write_report

        histories = {
            "teacher": inputs["teacher"] / "history.json",
            "baseline": inputs["distill"] / "baseline-history.json",
            "student": inputs["distill"] / "student-history.json",
        }
        write_report(
            context.out,
            result=read_json(inputs["benchmark"] / "result.json"),
            verdicts=read_gate(inputs["gate"]),
            histories={role: read_json(file) for role, file in histories.items() if file.is_file()},
            pipeline=context.job.config.model_dump(mode="json", exclude_defaults=True),
            extras={"parity": read_json(inputs["export"] / "parity.json")},
        )
