"""Stage gate: check the figures against the budgets. The verdict is a result, not an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context, Job


class GateStage:
    """Writes ``gate.json`` and ``gate.xml`` (JUnit)."""

    name = "gate"
    inputs = ("benchmark",)
    libraries = ()

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``gate`` and the profile's budgets."""
        return {
            "gate": job.config.gate.model_dump(mode="json"),
            "profile": [job.profile.name, job.profile.budget.model_dump(mode="json")],
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Check the figures and write the verdicts."""
        from edgekd.release.gate import evaluate, write_gate
        from edgekd.release.result import read_result

        result = read_result(inputs["benchmark"] / "result.json")
        verdicts = evaluate(result, context.job.budgets)
        write_gate(context.out, context.job.config.name, verdicts)
