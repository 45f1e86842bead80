"""The trials of a race in an Optuna study: claimed by one process each, resumed after a kill."""

from __future__ import annotations

import importlib
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from edgekd.errors import EdgekdError, InputError

Objectives = Sequence[tuple[str, Literal["max", "min"]]]

HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 120
"""A running trial is recorded as alive this often, and is taken over after this long without."""

_BUSY_SECONDS = 60
"""How long a locked SQLite file is waited for."""


@dataclass(frozen=True)
class RungScore:
    """The result of one arm on one rung: the objectives' values by name, and the training time."""

    epochs: int
    values: Mapping[str, float]
    seconds: float


class RaceTrials:
    """The trials of one race in an Optuna study, by (arm, epochs).

    Each is enqueued with these two as fixed parameters, and claimed by setting it running, which
    the storage grants to one process. Where two processes enqueued the same one at the same moment
    the lower number counts, and the other is marked as pruned.

    Attributes:
        definition: what the study is of.
        adopts: whether another definition that the storage has is taken instead.
    """

    def __init__(
        self,
        study_name: str,
        url: str | None,
        definition: Mapping[str, Any],
        objectives: Objectives,
        where: str,
    ) -> None:
        self.study_name, self.objectives = study_name, objectives
        self._url, self.definition, self._where = url, definition, where
        self.adopts = False
        self._optuna = import_optuna(where)
        self._storage: Any = None
        self._study: Any = None
        self._id = 0
        self._first_counted = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open or create the study; Optuna's own messages are off meanwhile."""
        logging = self._optuna.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            with self._errors(), _first_of(self._url), _quiet():
                self._open()
            yield
        finally:
            logging.set_verbosity(verbosity)
            if (engine := getattr(self._storage, "engine", None)) is not None:
                self._storage.remove_session()
                engine.dispose()

    def _open(self) -> None:
        optuna = self._optuna
        if self._url is None:
            self._storage = optuna.storages.InMemoryStorage()
        else:
            local = self._url.startswith("sqlite")
            self._storage = optuna.storages.RDBStorage(
                self._url,
                engine_kwargs={"connect_args": {"timeout": _BUSY_SECONDS}} if local else {},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
            )
        directions = ["maximize" if way == "max" else "minimize" for _, way in self.objectives]
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=self.study_name,
            directions=directions,
            sampler=optuna.samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )
        self._id = self._storage.get_study_id_from_name(self.study_name)
        found = self._study.user_attrs.get("race")
        if found is None and not self._study.get_trials(deepcopy=False):
            self._study.set_metric_names([name for name, _ in self.objectives])
            self._study.set_user_attr("race", self.definition)
            found = self._study.user_attrs.get("race")
        self._first_counted = self._study.user_attrs.get("failures before", 0)
        if self.adopts and found is not None and found.keys() == self.definition.keys():
            self.definition = found
        if found != self.definition:
            theirs = ", ".join((found or {}).get("arms", ())) or "trials that are not this race's"
            raise InputError(
                f"the storage already holds a study {self.study_name!r} of other candidates or "
                f"settings: {theirs[:300]}",
                where=self._where,
                remedy="name another storage, or remove that study (optuna delete-study)",
            )

    def finished(self, epochs: int) -> dict[str, RungScore | str]:
        """The finished trials of a rung by arm: the score, or why the arm dropped out."""
        found: dict[str, RungScore | str] = {}
        for trial in self._all():
            arm, attributes = trial.user_attrs.get("arm"), trial.user_attrs
            if attributes.get("epochs") != epochs or arm in found:
                continue
            if trial.state.name == "COMPLETE":
                names = [name for name, _ in self.objectives]
                values = dict(zip(names, trial.values, strict=True))
                found[arm] = RungScore(epochs, values, attributes["seconds"])
            elif self._dropped_out(trial):
                found[arm] = attributes["error"]
        return found

    def claim(self, arms: Sequence[str], epochs: int) -> int | None:
        """Enqueue the trials that are missing and take the first that is free, by its number."""
        live = self._live(epochs)
        if missing := [arm for arm in arms if arm not in live]:
            with self._errors():
                for arm in missing:
                    mine = {"arm": arm, "epochs": epochs}
                    self._study.enqueue_trial(mine, user_attrs=mine)
            live = self._live(epochs)
        free = [live[arm] for arm in arms if arm in live and live[arm].state.name == "WAITING"]
        return next((trial.number for trial in free if self._take(trial.number)), None)

    def arm_of(self, number: int) -> str:
        """The arm of a claimed trial, as Optuna's parameter."""
        with self._errors():
            trial = self._optuna.Trial(self._study, self._trial_id(number))
            trial.suggest_categorical("epochs", self.definition["rungs"])
            arm: str = trial.suggest_categorical("arm", self.definition["arms"])
            return arm

    @contextmanager
    def alive(self, number: int) -> Iterator[None]:
        """Record a running trial as alive from a thread, so that no other process takes it over."""
        if self._url is None:
            yield
            return
        stop, trial_id = Event(), self._trial_id(number)

        def beat() -> None:
            while not stop.wait(HEARTBEAT_SECONDS):
                with suppress(EdgekdError), self._errors():
                    self._storage.record_heartbeat(trial_id)
            self._storage.remove_session()

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def tell(self, number: int, values: Mapping[str, float], seconds: float) -> None:
        """Finish a trial; nothing happens if another process took it over meanwhile."""
        with self._errors(), suppress(RuntimeError):
            self._set(number, "seconds", round(seconds, 3))
            ordered = [values[name] for name, _ in self.objectives]
            self._study.tell(number, ordered, skip_if_finished=True)

    def tell_failed(self, number: int, reason: str) -> None:
        """Finish a trial whose arm drops out."""
        with self._errors(), suppress(RuntimeError):
            self._set(number, "error", reason[:2000])
        self.release(number)

    def release(self, number: int) -> None:
        """End a trial so that it is enqueued again, unless its arm dropped out."""
        with self._errors(), suppress(RuntimeError):
            failed = self._optuna.trial.TrialState.FAIL
            self._study.tell(number, state=failed, skip_if_finished=True)

    def release_dead(self) -> None:
        """Release the running trials of processes that no longer exist."""
        if self._url is None:
            return
        with self._errors(), _quiet():
            self._optuna.storages.fail_stale_trials(self._study)
        for trial in self._all():
            if trial.state.name == "RUNNING" and _is_dead(trial.user_attrs.get("process", "")):
                self.release(trial.number)

    def forget_failures(self) -> None:
        """Let the next call try the arms that dropped out so far again."""
        with self._errors():
            self._study.set_user_attr(
                "failures before", len(self._study.get_trials(deepcopy=False))
            )

    def _live(self, epochs: int) -> dict[str, Any]:
        """The rung's trials by arm: waiting, running, or finished for good; one of each arm."""
        live: dict[str, Any] = {}
        for trial in self._all():
            arm, state = trial.user_attrs.get("arm"), trial.state.name
            again = state == "FAIL" and not self._dropped_out(trial)
            if trial.user_attrs.get("epochs") != epochs or again or state == "PRUNED":
                continue
            if arm not in live:
                live[arm] = trial
            elif state == "WAITING" and self._take(trial.number):
                with self._errors():
                    self._set(trial.number, "same as trial", live[arm].number)
                    self._study.tell(trial.number, state=self._optuna.trial.TrialState.PRUNED)
        return live

    def _dropped_out(self, trial: Any) -> bool:
        failed = trial.state.name == "FAIL" and "error" in trial.user_attrs
        return failed and trial.number >= self._first_counted

    def _take(self, number: int) -> bool:
        """Whether this process, and no other, has set a waiting trial running."""
        with self._errors():
            trial_id = self._trial_id(number)
            if self._url is not None:
                # Before it runs: a trial without a heartbeat would never count as abandoned.
                self._storage.record_heartbeat(trial_id)
            try:
                running = self._optuna.trial.TrialState.RUNNING
                if not self._storage.set_trial_state_values(trial_id, running):
                    return False
                self._set(number, "process", _this_process())
            except RuntimeError:  # Finished by another process meanwhile.
                return False
        return True

    def _set(self, number: int, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._trial_id(number), key, value)

    def _trial_id(self, number: int) -> int:
        found: int = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        return found

    def _all(self) -> list[Any]:
        """All trials in the order of their numbers."""
        with self._errors():
            return sorted(self._study.get_trials(deepcopy=False), key=lambda trial: trial.number)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the storage raises into an InputError with the remedy."""
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError

        try:
            yield
        except (ArgumentError, ImportError) as error:
            raise self._error(
                f"the storage {self._shown} cannot be used: {_first_line(error)}",
                "write a URL of SQLAlchemy, such as sqlite:///race.sqlite3 or "
                "postgresql://user@host/database, and install the driver that it names",
            ) from error
        except (
            SQLAlchemyError,
            self._optuna.exceptions.StorageInternalError,
            OSError,
            KeyError,
            Timeout,
        ) as error:
            raise self._error(
                f"the storage {self._shown} cannot be read or written: "
                f"{_first_line(error.__cause__ or error)}",
                "check that the database can be reached, may be written and is not locked; what "
                "is finished stays there, and the next run resumes",
            ) from error

    def _error(self, what: str, remedy: str) -> InputError:
        return InputError(what, where=self._where, remedy=remedy)

    @property
    def _shown(self) -> str:
        return re.sub(r":[^:/@]+@", ":…@", self._url or "in memory")


def publish(
    value: Sequence[str], url: str, study: str, where: str = "student.search.storage"
) -> list[str]:
    """What the first process published in a storage under this name: its value, or this one.

    Raises:
        InputError: as :meth:`RaceTrials.open`.
    """
    trials = RaceTrials(study, url, {"published": list(value)}, (("published", "max"),), where)
    trials.adopts = True
    with trials.open():
        return list(trials.definition["published"])


def import_optuna(where: str) -> Any:
    """The package Optuna.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise InputError(
            f"a race needs the package {error.name!r}, which is not installed",
            where=where,
            remedy="pip install 'edgekd[search]'",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings that metric names and heartbeats are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_of(url: str | None) -> Any:
    """A lock on the tables of an SQLite file, which two processes must not create together."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url) if url is not None else None
    if parsed is None or parsed.get_backend_name() != "sqlite" or not parsed.database:
        return nullcontext()
    if parsed.database == ":memory:" or parsed.database.startswith("file:"):
        return nullcontext()
    return FileLock(f"{Path(parsed.database)}.lock", timeout=_BUSY_SECONDS)


def _this_process() -> str:
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def _is_dead(process: str) -> bool:
    """Whether a process of this machine, as named by :func:`_this_process`, has ended."""
    host, _, number = process.partition(" ")
    if host != socket.gethostname():
        return False
    pid, started = number.split()
    try:
        # The number may have been given to another process since.
        return bool(abs(psutil.Process(int(pid)).create_time() - float(started)) > 1)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
