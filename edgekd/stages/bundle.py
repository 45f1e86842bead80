"""Stage bundle: what is copied to the device. Withheld when the gate did not pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import GateFailed
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.fitting import open_ground, read_json

EXAMPLE_SAMPLES = 8


class BundleStage:
    """Writes the bundle's folder ``<name>/`` and ``<name>.tar.gz``.

    Raises:
        GateFailed: a rule of the gate failed or was not shown.
    """

    name = "bundle"
    inputs = ("data", "engines", "benchmark", "gate")
    code = ("edgekd.stages.bundle", "edgekd.release.bundle")
    libraries = ("numpy",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.pipeline.fingerprint import file_sha256
        from edgekd.resources import edgerun_folder

        device_side = {
            file.name: file_sha256(file) for file in sorted(edgerun_folder().glob("*.py"))
        }
        return {"name": job.config.name, "edgerun": device_side}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """See :class:`edgekd.pipeline.stage.Stage`."""
        from edgekd.engines.onnx import describe_onnx
        from edgekd.release.bundle import write_bundle
        from edgekd.release.gate import read_gate
        from edgekd.release.verdict import passed
        from edgekd.resources import edgerun_folder

        config = context.job.config
        verdicts = read_gate(inputs["gate"])
        if not passed(verdicts):
            missed = [verdict for verdict in verdicts if verdict.status != "pass"]
            raise GateFailed(
                "the gate did not pass: "
                + "; ".join(f"{v.rule} {v.status} ({v.reason})" for v in missed),
                where=f"gate of {config.name}",
                remedy="see the report; the bundle is withheld until every rule passes",
            )
        ground = open_ground(inputs["data"], config)
        dataset = ground.dataset
        test = dataset.splits["test"]
        engine = read_json(inputs["engines"] / "engines.json")["student"]
        model = inputs["engines"] / "student.onnx"
        write_bundle(
            context.out / config.name,
            model=model,
            edgerun_folder=edgerun_folder(),
            name=config.name,
            spec=describe_onnx(model).spec,
            preprocess={name: entry.to_json() for name, entry in dataset.preprocess.items()},
            labels=dataset.labels,
            task={"name": ground.task.name, "output": ground.task.output},
            runtime={"providers": engine["providers"], "threads": engine["threads"]},
            result=read_json(inputs["benchmark"] / "result.json"),
            example={
                name: array[:EXAMPLE_SAMPLES]
                for name, array in test.arrays.items()
                if name in {spec.name for spec in dataset.inputs}
            },
        )
