"""The interface between a stage and the runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgekd.config.budgets import Budgets
from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import Profile
from edgekd.errors import InputError
from edgekd.progress import Progress


@dataclass(frozen=True)
class Job:
    """A job: a validated pipeline, the path of its file, and the device profile."""

    config: PipelineConfig
    base: Path
    """The folder of the pipeline file: relative paths and own modules are found from here."""
    profile: Profile

    @property
    def task_settings(self) -> list[Any]:
        """The task's name and arguments, for a stage's ``config_slice``."""
        return [self.config.task, self.config.task_args]

    @property
    def budgets(self) -> Budgets:
        """Those of the section ``gate``, else the profile's limits."""
        return Budgets.resolve(self.config.gate, self.profile)

    def path(self, name: str) -> Path:
        """A path of the pipeline file; a relative one is resolved from the file's folder."""
        return self.base / Path(name).expanduser()

    def existing_file(self, name: str, where: str) -> Path:
        """:meth:`path` of a file that the key ``where`` names.

        Raises:
            InputError: there is no such file.
        """
        path = self.path(name)
        if not path.is_file():
            raise InputError(
                f"the file {name!r} does not exist",
                where=where,
                remedy=f"give a path from the pipeline file's folder; looked at {path}",
            )
        return path


@dataclass(frozen=True)
class Context:
    """The job, folders and progress that a stage uses while it runs."""

    job: Job
    out: Path
    """An empty folder: what the stage writes here becomes its artifact, atomically."""
    scratch: Path
    """A folder that survives a kill (epoch checkpoints) and is removed when the stage is done."""
    cache: Path
    """A folder of the run for reproducible files; it is preserved after the stage."""
    progress: Progress
    fingerprints: Mapping[str, str]
    """The fingerprints of the stages that ran before, by name."""


class Stage(Protocol):
    """One step of the pipeline.

    A stage is run again when its fingerprint changes: that of :meth:`config_slice`, of its
    inputs' contents, of the versions of ``libraries``, and of the code that its own module imports
    (:mod:`edgekd.pipeline.fingerprint`).
    """

    @property
    def name(self) -> str:
        """Its name, that of its file."""
        ...

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stages whose artifacts it reads."""
        ...

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose version affects the stage's artifact."""
        ...

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The part of the job that the stage's result depends on, as JSON values."""
        ...

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Read the artifacts of ``inputs``, write this stage's into ``context.out``."""
        ...
