"""Run the stages of a job in order; skip those whose fingerprint is already in the store."""

from __future__ import annotations

import errno
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgekd.errors import EdgekdError, GateFailed, StageError, unknown_name
from edgekd.extension import searching
from edgekd.files import json_sha256
from edgekd.pipeline.fingerprint import (
    code_sha256,
    extension_versions,
    library_versions,
    references_sha256,
)
from edgekd.pipeline.stage import Context, Job, Stage
from edgekd.pipeline.store import Artifact, Store
from edgekd.pipeline.workers import Workers
from edgekd.progress import EventLog, Progress

_LINKED = ("benchmark", "report", "bundle")


@dataclass(frozen=True)
class PlanRow:
    """One row of the plan: what a run would do with a stage, and why."""

    stage: str
    action: Literal["cached", "run"]
    reason: str


@dataclass
class RunOutcome:
    """The outcome of a run: the artifacts by stage, and which of them are new."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    failure: GateFailed | None = None
    """Why there is no bundle, when the gate did not pass: shown as a result before it is raised as
    an error."""

    def folder(self, stage: str) -> Path:
        """The artifact folder of a finished stage."""
        return self.artifacts[stage].folder


def stages_until(name: str | None, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages up to and including ``name``; all of them for None.

    Raises:
        InputError: there is no such stage.
    """
    if name is None:
        return stages
    names = [stage.name for stage in stages]
    if name not in names:
        raise unknown_name("stage", name, names, where="--until")
    return stages[: names.index(name) + 1]


def plan(
    job: Job, folder: Path, stages: tuple[Stage, ...], until: str | None = None
) -> list[PlanRow]:
    """The plan of what :class:`Runner` would do; nothing is run."""
    store = Store(folder)
    done: dict[str, Artifact] = {}
    rows = []
    with searching(job.base):
        for stage in stages_until(until, stages):
            waiting = [name for name in stage.inputs if name not in done]
            if waiting:
                rows.append(PlanRow(stage.name, "run", f"after {', '.join(waiting)}"))
                continue
            material = fingerprint_inputs(stage, job, done)
            artifact = store.find(stage.name, json_sha256(material))
            if artifact is None:
                reason = _why(material, store.latest(stage.name))
                rows.append(PlanRow(stage.name, "run", reason))
            else:
                done[stage.name] = artifact
                rows.append(PlanRow(stage.name, "cached", artifact.fingerprint[:16]))
    return rows


class Runner:
    """Runs the outdated stages of one job in one run folder, whose lock the caller holds.

    Args:
        stages: in the order in which they run; no stage is treated specially.
        preflight: called once with the job, and whether it is gated, before the first stage runs;
            it raises InputError where a name in the pipeline cannot be resolved.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        progress: Progress,
        stages: tuple[Stage, ...],
        log: EventLog | None = None,
        workers: Workers | None = None,
        preflight: Callable[[Job, bool], None] | None = None,
    ) -> None:
        self.job = job
        self.store = store
        self.progress = progress
        self.log = log
        self.stages = stages
        self.workers = workers
        self.preflight = preflight
        self.outcome = RunOutcome()

    def run(self, until: str | None = None) -> RunOutcome:
        """Run all stages up to ``until`` that are not up to date.

        Raises:
            EdgekdError: a stage failed; artifacts of finished stages remain in the store. A gate
                that did not pass is not raised: it is the outcome's ``failure``.
        """
        try:
            self._run(until)
        except GateFailed as failure:
            self.outcome.failure = failure
        return self.outcome

    def _run(self, until: str | None) -> None:
        checked = False
        stages = stages_until(until, self.stages)
        names = [stage.name for stage in stages]
        with searching(self.job.base):
            for stage in stages:
                material = fingerprint_inputs(stage, self.job, self.outcome.artifacts)
                fingerprint = json_sha256(material)
                artifact = self.store.find(stage.name, fingerprint)
                if artifact is not None:
                    self.progress.message(f"{stage.name}: unchanged, skipped")
                else:
                    if not checked:
                        # Every name is resolved before any training starts.
                        if self.preflight is not None:
                            self.preflight(self.job, "gate" in names)
                        checked = True
                    reason = _why(material, self.store.latest(stage.name))
                    self.progress.message(f"{stage.name}: {reason}")
                    artifact = self._run_stage(stage, fingerprint, material)
                    self.outcome.ran.append(stage.name)
                self.outcome.artifacts[stage.name] = artifact
                if stage.name in _LINKED:
                    self.store.link(stage.name, artifact)

    def _run_stage(self, stage: Stage, fingerprint: str, material: Mapping[str, Any]) -> Artifact:
        started = time.monotonic()
        done = self.outcome.artifacts
        self._record("stage-started", stage=stage.name, fingerprint=fingerprint)
        try:
            if stage.name in _LINKED:
                self.store.unlink(stage.name)
            temporary = self.store.begin(stage.name, fingerprint)
            scratch = self.store.scratch(stage.name, fingerprint)
            fingerprints = {name: made.fingerprint for name, made in done.items()}
            fingerprints[stage.name] = fingerprint
            cache = self.store.folder / "cache"
            context = Context(self.job, temporary, scratch, cache, self.progress, fingerprints)
            inputs = {name: done[name].folder for name in stage.inputs}
            if self.workers is None:
                stage.run(context, inputs)
            else:
                self.workers.run(stage, context, inputs)
            artifact = self.store.commit(stage.name, fingerprint, temporary, material)
        except Exception as error:
            self._record("stage-failed", stage=stage.name, traceback=traceback.format_exc())
            self.store.discard(stage.name, fingerprint)
            raise _explained(error, stage, self.store) from error
        shutil.rmtree(scratch, ignore_errors=True)
        seconds = time.monotonic() - started
        self._record("stage-done", stage=stage.name, seconds=round(seconds, 3))
        self.progress.message(f"{stage.name}: done in {seconds:.1f} s")
        return artifact

    def _record(self, event: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.write(event, **fields)


def _explained(error: Exception, stage: Stage, store: Store) -> EdgekdError:
    """Convert any exception of a stage into an error with a remedy."""
    if is_disk_full(error, store.folder):
        return StageError(
            f"the disk is full: stage {stage.name!r} could not write its result",
            where=str(store.folder),
            remedy="free space and run again: finished stages and epochs are stored",
        )
    if isinstance(error, EdgekdError):
        return error
    return StageError(
        f"stage {stage.name!r} failed: {type(error).__name__}: {error}",
        where=f"stage {stage.name}",
        remedy=f"the complete traceback is in {store.folder / 'log.jsonl'}",
    )


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an exception, or one that caused it, comes from a full disk.

    Libraries with a compiled core hide the system's error number behind a text, or name only
    the write that failed; for these the free space decides.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error).lower()
        if "no space left" in text or "os error 28" in text:
            return True
        if "write" in text and shutil.disk_usage(folder).free < 1 << 16:
            return True
        error = error.__cause__ or error.__context__
    return False


def fingerprint_inputs(stage: Stage, job: Job, done: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything that a stage's result depends on."""
    chosen = stage.config_slice(job)
    return {
        "stage": stage.name,
        "config": chosen,
        "references": references_sha256(chosen),
        "inputs": {name: done[name].digest for name in stage.inputs},
        "code": code_sha256((type(stage).__module__,)),
        "libraries": {**library_versions(stage.libraries), **extension_versions(chosen)},
    }


def _why(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """A short reason why a stage is run again."""
    if before is None:
        return "not made yet"
    changes = _changes(now["config"], before.get("config", {}), "")
    if changes:
        return "changed: " + "; ".join(changes[:3]) + (" …" if len(changes) > 3 else "")
    inputs = _changed_keys(now["inputs"], before.get("inputs", {}))
    if inputs:
        return f"new input from {', '.join(inputs)}"
    libraries = _changed_keys(now["libraries"], before.get("libraries", {}))
    if libraries:
        return f"other version of {', '.join(libraries)}"
    if now["references"] != before.get("references"):
        return "your own source changed"
    if now["code"] != before.get("code"):
        return "edgekd's own code changed"
    return "its files were damaged or removed"


def _changed_keys(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    return [key for key, value in now.items() if before.get(key) != value]


def _changes(now: Any, before: Any, key: str) -> list[str]:
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        names = sorted({*now, *before})
        return [
            change
            for name in names
            for change in _changes(now.get(name), before.get(name), f"{key}.{name}".lstrip("."))
        ]
    if isinstance(now, Sequence) and not isinstance(now, str):
        now = list(now)
    return [] if now == before else [f"{key} {_short(before)} → {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
