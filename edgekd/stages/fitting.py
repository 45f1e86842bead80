"""What teacher and distill share: a network, an objective and the data, brought together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.pipeline import PipelineConfig, TrainConfig

if TYPE_CHECKING:
    from edgekd.data.dataset import Dataset
    from edgekd.data.loader import Loader
    from edgekd.distill.objective import Objective
    from edgekd.distill.teacher import Teacher
    from edgekd.models.named import NamedModel
    from edgekd.pipeline.stage import Context
    from edgekd.tasks import Task

TRAINING_CODE = ("edgekd.stages.fitting", "edgekd.data", "edgekd.tasks", "edgekd.models",
                 "edgekd.distill")  # fmt: skip
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Ground:
    """The data and the task of a pipeline, opened."""

    dataset: Dataset
    task: Task
    config: PipelineConfig

    def validation_loader(self, channels_last: bool = False) -> Loader:
        """The validation split in its order, unaugmented."""
        from edgekd.data.loader import Loader

        split = self.dataset.splits["validation"]
        return Loader(split, self.dataset, EVALUATION_BATCH, channels_last=channels_last)


def open_ground(data: Path, config: PipelineConfig) -> Ground:
    """Open the data stage's artifact."""
    from edgekd.data.store import open_dataset
    from edgekd.tasks import get_task

    return Ground(open_dataset(data), get_task(config.task, config.task_args), config)


def fit(
    ground: Ground,
    model: NamedModel,
    objective: Objective,
    train_config: TrainConfig,
    label: str,
    context: Context,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place; its weights are then the best ones on the validation split.

    Returns:
        The history as JSON values.
    """
    from edgekd.data.loader import Loader
    from edgekd.distill.trainer import train

    dataset, config = ground.dataset, ground.config
    channels_last = train_config.channels_last
    training = Loader(
        dataset.splits["train"],
        dataset,
        train_config.batch_size,
        augment=config.data.augment,
        channels_last=channels_last,
    )
    history = train(
        model,
        objective,
        (training, ground.validation_loader(channels_last)),
        ground.task,
        train_config,
        config.seed,
        teacher=teacher,
        checkpoint_folder=context.scratch / label.replace(" ", "-"),
        progress=context.progress,
        label=label,
    )
    rows: dict[str, Any] = history.to_json()
    return rows


def write_json(path: Path, value: Any) -> None:
    """Write JSON values in the form all artifacts use."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
