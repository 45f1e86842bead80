"""Stage bundle: the folder that is copied to the device. Withheld when the gate did not pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import GateFailed
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.engine_builders import FURTHER
from edgekd.stages.quantize import STUDENT
from edgekd.stages.task_data import ENGINES_SCHEMA, open_task_data, read_json

EXAMPLE_SAMPLES = 8


class BundleStage:
    """Writes the bundle's folder ``<name>/`` and ``<name>.tar.gz``.

    Raises:
        GateFailed: a rule of the gate failed or was inconclusive.
    """

    name = "bundle"
    inputs = ("data", "engines", "benchmark", "gate")
    libraries = ("numpy",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The settings of the export and the profile that the bundle depends on."""
        return {"name": job.config.name}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Write the bundle, if the gate passed."""
        from edgekd.files import edgerun_folder
        from edgekd.onnx.file import describe_onnx
        from edgekd.release.bundle import write_bundle
        from edgekd.release.gate import passed, read_gate
        from edgekd.release.result import read_result

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
        task_data = open_task_data(inputs["data"], config)
        dataset = task_data.dataset
        test = dataset.splits["test"]
        prepared = dataset.model_inputs("test", 0, min(EXAMPLE_SAMPLES, len(test)))
        engine = read_json(inputs["engines"] / "engines.json", ENGINES_SCHEMA)["student"]
        # Where TensorRT is measured, this is the file that its engine was built from.
        model = inputs["engines"] / STUDENT
        write_bundle(
            context.out / config.name,
            model=model,
            edgerun_folder=edgerun_folder(),
            name=config.name,
            spec=describe_onnx(model).spec,
            preprocess={name: entry.to_json() for name, entry in dataset.preprocess.items()},
            labels=dataset.labels,
            task={"name": task_data.task.name, "output": task_data.task.output},
            runtime={
                "providers": engine["providers_requested"],
                "threads": engine["threads"],
                # Named only where the runtime's own optimization would change the outputs.
                **(
                    {"optimization": "disabled"}
                    if engine.get("disabled_optimizers") and engine["run_level"] == "disabled"
                    else {}
                ),
            },
            engines=inputs["engines"] / FURTHER,
            result=read_result(inputs["benchmark"] / "result.json"),
            example={
                # The device prepares raw uint8 itself; other dtypes must be preprocessed already.
                name: test.arrays[name][:EXAMPLE_SAMPLES]
                if test.arrays[name].dtype == np.uint8
                else prepared[name]
                for name in prepared
            },
        )
