"""Stage report: the figures as one HTML page, as JSON and as a summary for a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context, Job
from edgekd.release.student_search import SEARCH
from edgekd.stages.comparison import COMPARISON
from edgekd.stages.quantize import INDEX
from edgekd.stages.recipes import RECIPES
from edgekd.stages.task_data import read_json


class ReportStage:
    """Writes ``report.html``, ``report.json`` and ``summary.md``."""

    name = "report"
    inputs = ("teacher", "student", "distill", "export", "quantize", "engines", "benchmark", "gate")
    libraries = ("jinja2",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The settings that the report shows."""
        return {"pipeline": job.config.model_dump(mode="json", exclude_defaults=True)}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Write the report."""
        from edgekd.release.gate import read_gate
        from edgekd.release.report import quantized_rows, write_report
        from edgekd.release.result import read_result

        histories = {
            "teacher": inputs["teacher"] / "history.json",
            "baseline": inputs["distill"] / "baseline-history.json",
            "student": inputs["distill"] / "student-history.json",
        }
        for file in sorted(inputs["quantize"].glob("*-history.json")):
            histories[file.name.removesuffix("-history.json")] = file
        found = {role: read_json(file) for role, file in histories.items() if file.is_file()}
        records = {
            "search": inputs["student"] / SEARCH,
            "comparison": inputs["distill"] / COMPARISON,
            "recipes": inputs["distill"] / RECIPES,
        }
        write_report(
            context.out,
            result=read_result(inputs["benchmark"] / "result.json"),
            verdicts=read_gate(inputs["gate"]),
            histories=found,
            pipeline=context.job.config.model_dump(mode="json", exclude_defaults=True),
            extras={
                "choice": read_json(inputs["engines"] / "choice.json"),
                "parity": read_json(inputs["export"] / "parity.json"),
                **{name: read_json(f) for name, f in records.items() if f.is_file()},
                **quantized_rows(read_json(inputs["quantize"] / INDEX)),
                "Chosen epochs": {role: _chosen(history) for role, history in found.items()},
            },
        )


def _chosen(history: dict[str, Any]) -> dict[str, Any]:
    """The validation of the best epoch, whose weights are used, and of the last one."""
    epochs, best = history["epochs"], history["best_epoch"]
    metric = f"validation {history['metric']}"
    return {
        "kept epoch": f"{best} of {len(epochs)}",
        f"{metric} of the kept epoch": round(epochs[best - 1]["validation"], 5),
        f"{metric} of the last epoch": round(epochs[-1]["validation"], 5),
    }
