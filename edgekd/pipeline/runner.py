"""Run the stages of a job in order, in one process or several; skip what is in the store.

``torchrun --nproc-per-node 2 -m edgekd run …``: the first process runs the stages, writes the
store and prints. The others wait for its commands and join the trainings, with an output
folder that is discarded. All need access to the same files.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.config.host import world_size
from edgekd.errors import EdgekdError, GateFailed, InputError, StageError, unknown_name
from edgekd.extension import searching
from edgekd.files import json_sha256
from edgekd.pipeline.fingerprint import (
    edited_sources,
    fingerprint_inputs,
    is_imported,
    why_outdated,
)
from edgekd.pipeline.stage import Context, Job, Stage
from edgekd.pipeline.store import Artifact, Store
from edgekd.progress import EventLog, Progress, Silent

if TYPE_CHECKING:
    from edgekd.distill.distributed import ProcessGroup

_LINKED = ("benchmark", "report", "bundle")

_MOST_REPAIRS = 5


class _Damaged(Exception):
    """Artifacts whose files are no longer those that were written."""

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        super().__init__()
        self.artifacts = artifacts


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
                reason = why_outdated(material, store.latest(stage.name))
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
        for _ in range(_MOST_REPAIRS):
            try:
                self._run(until)
            except GateFailed as failure:
                self.outcome.failure = failure
            except _Damaged as damaged:
                for artifact in damaged.artifacts:
                    self.progress.message(f"{artifact.stage}: damaged on the disk, made again")
                    self.store.remove(artifact)
                self.outcome.artifacts.clear()
                continue
            return self.outcome
        raise StageError(
            "artifacts were damaged on the disk again and again",
            where=str(self.store.artifacts),
            remedy="check the disk, or give a run folder on another one with --output",
        )

    def _run(self, until: str | None) -> None:
        checked = False
        stages = stages_until(until, self.stages)
        names = [stage.name for stage in stages]
        with searching(self.job.base):
            for stage in stages:
                material = fingerprint_inputs(stage, self.job, self.outcome.artifacts)
                fingerprint = json_sha256(material)
                artifact = self.store.find(stage.name, fingerprint)
                if artifact is not None and stage.name in _LINKED:
                    self._check_artifacts([artifact])
                if artifact is not None:
                    self.progress.message(f"{stage.name}: unchanged, skipped")
                else:
                    if not checked:
                        # Every name is resolved before any training starts.
                        if self.preflight is not None:
                            self.preflight(self.job, "gate" in names)
                        checked = True
                    reason = why_outdated(material, self.store.latest(stage.name))
                    self.progress.message(f"{stage.name}: {reason}")
                    artifact = self._run_stage(stage, fingerprint, material)
                    self.outcome.ran.append(stage.name)
                self.outcome.artifacts[stage.name] = artifact
                if stage.name in _LINKED:
                    self.store.link(stage.name, artifact)

    def _run_stage(self, stage: Stage, fingerprint: str, material: Mapping[str, Any]) -> Artifact:
        started = time.monotonic()
        done = self.outcome.artifacts
        read = [done[name] for name in stage.inputs]
        # What is shipped is of a run whose artifacts are all undamaged.
        self._check_artifacts(list(done.values()) if stage.name == _LINKED[-1] else read)
        self._check_sources(material, before=True)
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
            self._check_sources(material, before=False)
            if stage.name in (*_LINKED, "gate"):
                self._check_artifacts(read)  # what is shipped is what was measured
            artifact = self.store.commit(stage.name, fingerprint, temporary, material)
        except _Damaged:
            self.store.discard(stage.name, fingerprint)
            raise
        except Exception as error:
            self._record("stage-failed", stage=stage.name, traceback=traceback.format_exc())
            self.store.discard(stage.name, fingerprint)
            raise _explained(error, stage, self.store) from error
        shutil.rmtree(scratch, ignore_errors=True)
        seconds = time.monotonic() - started
        self._record("stage-done", stage=stage.name, seconds=round(seconds, 3))
        self.progress.message(f"{stage.name}: done in {seconds:.1f} s")
        return artifact

    def _check_artifacts(self, artifacts: Sequence[Artifact]) -> None:
        """Hash what a stage reads: a flipped bit leaves a file's time stamp and size."""
        damaged = [each for each in artifacts if not self.store.is_undamaged(each)]
        if damaged:
            raise _Damaged(damaged)

    def _check_sources(self, material: Mapping[str, Any], before: bool) -> None:
        """Compare own code with the form of it that this process imported.

        Raises:
            InputError: the result is not, or may not be, that of the code in the fingerprint.
        """
        config, references = material["config"], material["references"]
        edited = edited_sources(config)
        names = ", ".join(sorted(str(file) for file in edited))
        if edited and not before and all(edited.values()) and is_imported(config, references):
            self.progress.message(f"  edited meanwhile, used in its old form: {names}")
        elif edited:
            raise InputError(
                f"your own code was edited after this run imported it: {names}",
                where=names,
                remedy="run again; finished stages are stored",
            )
        elif not is_imported(config, references):
            raise InputError(
                "this process imported another form of your own code, or a module of that name",
                where=", ".join(sorted(references)),
                remedy="run it in a new process; finished stages are stored",
            )

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


_TRAINING = ("teacher", "distill")


@dataclass(frozen=True)
class Command:
    """A command of the first process to the others: join a stage or, without one, exit."""

    stage: str | None
    context: Context | None = None
    inputs: Mapping[str, Path] | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class _Failure:
    """How a process failed; the first to fail is the cause of the others' failures."""

    at: float
    rank: int
    error: EdgekdError
    trace: str


@contextmanager
def join_workers() -> Iterator[Workers | None]:
    """The processes of this run; None with a single process.

    When the first process exits, also by an error, the others exit with its exit code.

    Raises:
        StageError: the processes could not connect.
    """
    if world_size() == 1:
        yield None
        return
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in edgekd.api.execute
    from edgekd.distill.distributed import open_process_group

    workers = Workers(open_process_group())
    if not workers.is_main:
        yield workers
        return
    try:
        yield workers
    except BaseException as error:
        workers.end(_exit_code(error))
        raise
    workers.end(0)


class Workers:
    """The processes of a run, from the view of one of them."""

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes
        self.is_main = processes.rank == 0

    def run(self, stage: Stage, context: Context, inputs: Mapping[str, Path]) -> None:
        """Run a stage in the first process, or in all processes when it trains.

        Raises:
            Exception: that of the process that failed first.
        """
        if stage.name not in _TRAINING:
            stage.run(context, inputs)
            return
        context.progress.message(f"  {stage.name}: {self._processes.count} processes train")
        sent = replace(context, progress=Silent(), fingerprints=dict(context.fingerprints))
        self._broadcast(Command(stage.name, sent, dict(inputs)))
        own, failures = self._gather_failures(partial(stage.run, context, inputs))
        if own is not None and not isinstance(own, Exception):
            raise own
        cause = min(failures, key=lambda failure: failure.at, default=None)
        if cause is None:
            return
        if own is not None and cause.rank == 0:
            raise own
        raise cause.error from RuntimeError(f"in process {cause.rank}:\n{cause.trace}")

    def serve(self, stages: Sequence[Stage]) -> None:
        """Execute the first process's commands until it exits.

        Raises:
            SystemExit: it exited with an exit code other than 0.
            StageError: it ended without a final command.
        """
        while (command := self._broadcast(None)).stage is not None:
            stage = next(stage for stage in stages if stage.name == command.stage)
            self._gather_failures(partial(_join, stage, command))
        if command.exit_code:
            # Launchers end all processes when one fails, and the first has not printed its error
            # yet.
            with suppress(EdgekdError, KeyboardInterrupt):
                self._broadcast(None)
            raise SystemExit(command.exit_code)

    def end(self, exit_code: int) -> None:
        """Tell the other processes to exit."""
        with suppress(EdgekdError):
            self._broadcast(Command(None, exit_code=exit_code))

    def _broadcast(self, command: Command | None) -> Command:
        """Broadcast the first process's command; the others' is ignored."""
        try:
            return self._processes.broadcast_object(command)
        except RuntimeError as error:
            raise _process_lost() from error

    def _gather_failures(
        self, work: Callable[[], None]
    ) -> tuple[BaseException | None, tuple[_Failure, ...]]:
        """Gather the failures of a training from all processes."""
        own: BaseException | None = None
        failure: _Failure | None = None
        rank = self._processes.rank
        try:
            work()
        except BaseException as error:
            own = error
            failure = _Failure(
                time.time(), rank, _as_edgekd_error(error, rank), traceback.format_exc()
            )
            self._processes.abort()
        try:
            failures = self._processes.all_gather_object(failure)
        except RuntimeError as error:
            if own is not None and not isinstance(own, RuntimeError):
                raise own from error
            raise _process_lost() from error
        return own, tuple(found for found in failures if found is not None)


def _join(stage: Stage, command: Command) -> None:
    assert command.context is not None
    assert command.inputs is not None
    context = command.context
    # What a kill leaves there is removed with the scratch folder.
    with tempfile.TemporaryDirectory(dir=context.scratch) as folder, searching(context.job.base):
        stage.run(replace(context, out=Path(folder)), command.inputs)


def _as_edgekd_error(error: BaseException, rank: int) -> EdgekdError:
    """An error in a form that can be sent to another process."""
    if isinstance(error, EdgekdError):
        return error
    return StageError(
        f"process {rank} failed: {type(error).__name__}: {error}",
        remedy="the complete traceback is in the run folder's log.jsonl",
    )


def _process_lost() -> StageError:
    return StageError(
        f"one of the {world_size()} processes of this run is gone",
        remedy="see what ended it (memory, a signal); the next run resumes from the last epoch",
    )


def _exit_code(error: BaseException) -> int:
    if isinstance(error, EdgekdError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
