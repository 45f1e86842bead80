"""Stage data: load the samples once, split and check them, store them for memory mapping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.pipeline.stage import Context, Job


class DataStage:
    """Writes ``dataset.json`` and one ``.npy`` per split and name."""

    name = "data"
    inputs = ()
    libraries = ("numpy",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``data``, the task, and hashes of the source's files."""
        from edgekd.data.sources import SOURCES, source_fingerprint

        config = job.config
        return {
            "data": config.data.model_dump(mode="json", exclude={"augment", "path", "download"}),
            "source": source_fingerprint(config.data, job.base),
            # Only the user's own function may draw from it; built-in splits are seed-free.
            "seed": config.seed if config.data.source not in SOURCES else None,
            "task": job.task_settings,
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Load, split and check the samples, and write the dataset."""
        from edgekd.data.classes import ClassTarget
        from edgekd.data.dataset import save_dataset
        from edgekd.data.sources import load_dataset
        from edgekd.tasks import Classification, get_task

        config = context.job.config
        task = get_task(config.task, config.task_args)
        classes = (
            ClassTarget(task.target, task.classes) if isinstance(task, Classification) else None
        )
        dataset = load_dataset(config.data, context.job.base, config.seed, classes)
        task.check(dataset)
        save_dataset(dataset, context.out)
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in dataset.splits.items())
        context.progress.message(f"  {dataset.source}: {sizes}")
        for remark in dataset.remarks:
            context.progress.message(f"  {remark}")
