"""Several processes of one run: the first runs the stages, the others join its trainings.

``torchrun --nproc-per-node 2 -m edgekd run …``: the first process runs the stages, writes the
store and prints. The others wait for its commands and join the trainings, with an output
folder that is discarded. All need access to the same files.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.config.host import world_size
from edgekd.errors import EdgekdError, StageError
from edgekd.extension import searching
from edgekd.pipeline.stage import Context, Stage

if TYPE_CHECKING:
    from edgekd.distill.distributed import ProcessGroup

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


class _Silent:
    """The silent progress of the processes other than the first."""

    def start(self, label: str, total: int, unit: str) -> None: ...
    def advance(self, n: int = 1, **figures: float) -> None: ...
    def message(self, text: str) -> None: ...
    def finish(self) -> None: ...


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
        sent = replace(context, progress=_Silent(), fingerprints=dict(context.fingerprints))
        self._tell(Command(stage.name, sent, dict(inputs)))
        own, failures = self._together(partial(stage.run, context, inputs))
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

        Args:
            stages: the stages that the first process runs.

        Raises:
            SystemExit: it exited with an exit code other than 0.
            StageError: it ended without a final command.
        """
        while (order := self._tell(None)).stage is not None:
            stage = next(stage for stage in stages if stage.name == order.stage)
            self._together(partial(_take_part, stage, order))
        if order.exit_code:
            # Launchers end all processes when one fails, and the first has not printed its error
            # yet.
            with suppress(EdgekdError, KeyboardInterrupt):
                self._tell(None)
            raise SystemExit(order.exit_code)

    def end(self, exit_code: int) -> None:
        """Tell the other processes to exit."""
        with suppress(EdgekdError):
            self._tell(Command(None, exit_code=exit_code))

    def _tell(self, order: Command | None) -> Command:
        """Broadcast the first process's command; the others' ``order`` is ignored."""
        try:
            return self._processes.broadcast_object(order)
        except RuntimeError as error:
            raise _lost() from error

    def _together(
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
            failure = _Failure(time.time(), rank, _told(error, rank), traceback.format_exc())
            self._processes.abort()
        try:
            failures = self._processes.all_gather_object(failure)
        except RuntimeError as error:
            if own is not None and not isinstance(own, RuntimeError):
                raise own from error
            raise _lost() from error
        return own, tuple(found for found in failures if found is not None)


def _take_part(stage: Stage, order: Command) -> None:
    assert order.context is not None
    assert order.inputs is not None
    context = order.context
    # What a kill leaves there is removed with the scratch folder.
    with tempfile.TemporaryDirectory(dir=context.scratch) as folder, searching(context.job.base):
        stage.run(replace(context, out=Path(folder)), order.inputs)


def _told(error: BaseException, rank: int) -> EdgekdError:
    """An error in a form that can be sent to another process."""
    if isinstance(error, EdgekdError):
        return error
    return StageError(
        f"process {rank} failed: {type(error).__name__}: {error}",
        remedy="the complete traceback is in the run folder's log.jsonl",
    )


def _lost() -> StageError:
    return StageError(
        f"one of the {world_size()} processes of this run is gone",
        remedy="see what ended it (memory, a signal); the next run resumes from the last epoch",
    )


def _exit_code(error: BaseException) -> int:
    if isinstance(error, EdgekdError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
