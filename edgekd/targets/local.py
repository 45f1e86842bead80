"""This machine as a target: edgerun in a fresh process without torch and without edgekd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from edgekd.errors import (
    CrashError,
    EdgekdError,
    InputError,
    StageError,
    TargetError,
    edgerun_errors,
    is_utf8,
)
from edgekd.files import edgerun_folder
from edgekd.targets.target import BenchSettings, ProbeSettings, ProviderOptions, RunSettings
from edgerun.cli import LEVELS, command_words
from edgerun.errors import AS_JSON, BadInput, CannotWrite, EdgerunError, RunFailed
from edgerun.files import is_engine
from edgerun.limits import MEMORY, is_out_of_memory, memory_limit, too_large
from edgerun.process import OUT_OF_MEMORY, PARENT, named_signal
from edgerun.tensorrt.settings import BuildSettings

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
STDERR_LINES = 10
FILES = ("against", "engine", "inputs", "json", "manifest", "output", "timing_cache")
"""Settings that are files."""


class EdgerunTarget(ABC):
    """Runs ``python -m edgerun``, one fresh process for each call, which a subclass starts.

    The methods are those of :class:`edgekd.targets.target.Target`. All raise InputError when
    edgerun finds the input wrong, StageError when it cannot write a file, and TargetError when it
    cannot be started or finds no GPU for an engine. Where a runtime fails on a model,
    :meth:`bench`, :meth:`run` and :meth:`probe` raise StageError, and CrashError where it ends the
    process; the others raise TargetError then.
    """

    name: str

    @abstractmethod
    def _edgerun(self, command: str, model: Path | None, settings: Mapping[str, Any]) -> None:
        """Run a command of edgerun; the settings of :data:`FILES` are paths on this machine."""

    def _record(
        self, command: str, model: Path | None, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Run edgerun with ``--json`` and read its record."""
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder) / "record.json"
            self._edgerun(command, model, {"json": path, **settings})
            try:
                record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise TargetError(
                    f"edgerun {command} ended well but left no readable result: {error}",
                    where=self.name,
                    remedy="check the space in the temporary folder",
                ) from error
        return record

    def bench(
        self, model: Path, against: Path | None = None, **settings: Unpack[BenchSettings]
    ) -> dict[str, Any]:
        """Measure one model, or two in interleaved rounds: a record ``edgerun.bench/1``."""
        _check_names(settings, BenchSettings)
        options = settings.get("provider_options")
        models = [(model, options)]
        if against is not None:
            models.append((against, settings.get("against_options") or options))
        with self._explained(models, settings):
            return self._record("bench", model, {"against": against, **settings})

    def run(self, model: Path, inputs: Path, output: Path, **settings: Unpack[RunSettings]) -> None:
        """Write the model's outputs for every sample of an npz file to another one."""
        _check_names(settings, RunSettings)
        given = {"inputs": inputs, "output": output, **settings}
        with self._explained([(model, settings.get("provider_options"))], given):
            self._edgerun("run", model, given)

    def probe(self, model: Path, **settings: Unpack[ProbeSettings]) -> dict[str, Any]:
        """Open a model and run it once: a record ``edgerun.probe/1``.

        Raises:
            CrashError: the runtime ends the process. Where it does so at a high level of graph
                optimization, lower ones were tried and the remedy names the one that works.
            InputError: it needs more memory or time than :mod:`edgerun.limits` allows.
        """
        _check_names(settings, ProbeSettings)
        try:
            return self._record("probe", model, settings)
        except CrashError as crash:
            crash.where = str(model)
            crash.remedy = self._remedy(crash, model, settings)
            raise

    def _remedy(self, crash: CrashError, model: Path, settings: Mapping[str, Any]) -> str:
        """The remedy for a model that crashes its process; lower levels are tried."""
        if crash.signal == signal.SIGKILL:
            return OUT_OF_MEMORY
        for lower in LEVELS[LEVELS.index(settings.get("optimization", LEVELS[0])) + 1 :]:
            try:
                probed = {**settings, "optimization": lower}
                ran = self._record("probe", model, probed)["ran"]
            except EdgekdError:
                continue
            return (
                f"at graph optimization level {lower!r} it {'opens and runs' if ran else 'opens'} "
                f"(tried here): give 'edgekd build' or 'benchmark' --optimization {lower}, in a "
                f"pipeline engines: [{{kind: onnxruntime, optimization: {lower}}}], and a program "
                "of your own SessionOptions.graph_optimization_level"
            )
        if crash.signal == signal.SIGFPE:
            return (
                "that is a division of whole numbers without a result (by 0, or of the smallest by "
                "-1): give real inputs (--inputs DATA.npz)"
            )
        return (
            "no lower level of graph optimization helps (tried here); another release of ONNX "
            "Runtime may, or an export in another opset"
        )

    @contextmanager
    def _explained(
        self,
        models: Sequence[tuple[Path, ProviderOptions | None]],
        settings: Mapping[str, Any],
    ) -> Iterator[None]:
        """Replace a crash by the error that names the model and the step, if a probe crashes too.

        Args:
            models: each with the options of its providers.
            settings: of the call; those that a probe has, too, are its own.
        """
        try:
            yield
        except CrashError as crash:
            common = {k: settings[k] for k in ProbeSettings.__annotations__ if k in settings}
            for model, options in models:
                try:
                    self.probe(model, **{**common, "provider_options": options})
                except CrashError:
                    raise
                except EdgekdError:
                    pass  # That is not what ended the process.
            crash.where = crash.where or str(models[0][0])
            raise

    def build(self, model: Path, engine: Path, settings: BuildSettings) -> dict[str, Any]:
        """Build a TensorRT engine: a record ``edgerun.build/1``, also written next to it."""
        return self._record("build", model, {"engine": engine, **vars(settings)})

    def parse(self, model: Path, library: str) -> dict[str, Any]:
        """The verdict of TensorRT's parser on a model: a record ``edgerun.parse/1``."""
        return self._record("parse", model, {"library": library})

    def info(self, model: Path | None = None) -> dict[str, Any]:
        """Describe this machine, and a model's inputs and outputs: ``edgerun.info/1``."""
        return self._record("info", model, {})


class LocalTarget(EdgerunTarget):
    """This machine, and this interpreter."""

    name = "local"

    def _edgerun(self, command: str, model: Path | None, settings: Mapping[str, Any]) -> None:
        file, files = real_files(model, settings)
        words = command_words(command, file, {**settings, **files})
        with edgerun_errors():
            memory = memory_limit()
        # The child has this limit, so that it is known where the child is killed.
        limits = {} if memory is None else {MEMORY: f"{memory / 1e6:.6f}"}
        # An empty working folder: 'python -m' would prefer a numpy.py in the current folder.
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "edgerun", *words],
                    # Temporary files of a crashed process are removed with this folder.
                    env=clean_environment(settings.get("threads")) | limits | {"TMPDIR": folder},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                )
            except OSError as error:
                raise TargetError(
                    f"{sys.executable} could not be started: {error}", where=LocalTarget.name
                ) from error
        if done.returncode != 0:
            # An engine fails for what the machine lacks, an ONNX model by itself.
            runs_onnx = command in ("bench", "run", "probe") and file and not is_engine(file)
            raise error_of(command, done, file if runs_onnx else None, memory)


def real_files(
    model: Path | None, settings: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Path]]:
    """The model, and those of a call's settings that are files, as absolute paths without links:
    edgerun works in a folder of its own, and relative paths are meant from here.

    Raises:
        InputError: a path is not valid UTF-8.
    """
    files = {k: Path(os.path.realpath(settings[k])) for k in FILES if settings.get(k) is not None}
    file = None if model is None else Path(os.path.realpath(model))
    for path in (file, *files.values()):
        if not is_utf8(str(path)):
            raise InputError(
                "the path is not valid UTF-8, and the runtimes take no other",
                where=str(path),
                remedy="rename the folder or the file",
            )
    return file, files


def clean_environment(threads: int | None) -> dict[str, str]:
    """The environment of a measuring process.

    Python's own variables are dropped, so that nothing of this process's packages or settings
    is inherited but the interpreter; PYTHONPATH is edgerun's parent alone.
    """
    inherited = {k: value for k, value in os.environ.items() if not k.startswith("PYTHON")}
    own = {"PYTHONPATH": str(edgerun_folder().parent), PARENT: str(os.getpid())}
    return {**inherited, **own, **edgerun_variables(threads)}


def edgerun_variables(threads: int | None) -> dict[str, str]:
    """The variables of a measuring process that are the same on every machine."""
    return {
        "PYTHONDONTWRITEBYTECODE": "1",  # a run writes nothing outside its folders
        AS_JSON: "json",
        # numpy's libraries allocate buffers for each thread when imported: memory that no model
        # needs.
        **dict.fromkeys(THREAD_VARIABLES, str(threads or 1)),
    }


def _check_names(settings: Mapping[str, Any], known: type) -> None:
    """Raise TypeError for a keyword that is no setting, as a function of these settings would."""
    for name in settings:
        if name not in known.__annotations__:
            raise TypeError(f"there is no setting {name!r} in {known.__name__}")


def error_of(
    command: str,
    done: subprocess.CompletedProcess[str],
    model: Path | None,
    memory: int | None = None,
    target: str = LocalTarget.name,
) -> EdgerunError:
    """The error that a failed edgerun reported, or what it last wrote when it crashed.

    Args:
        model: the ONNX file that it ran; None for an engine and for other commands.
        memory: its limit in bytes.
        target: where it ran.
    """
    reported = reported_error(done.stderr)
    if reported is not None:
        what, where, remedy, code = (reported[k] for k in ("what", "where", "remedy", "code"))
        if code == BadInput.exit_code:
            return InputError(what, where=where, remedy=remedy)
        if code == CannotWrite.exit_code or (model is not None and code == RunFailed.exit_code):
            return StageError(what, where=where, remedy=remedy)
        return TargetError(what, where=where or target, remedy=remedy)
    code = done.returncode
    last = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-STDERR_LINES:])
    wrote = f"; it last wrote:\n{last}" if last else ""
    remedy = OUT_OF_MEMORY if code == -9 else None
    if code < 0 and model is not None and is_out_of_memory(done.stderr):
        # Thrown in a thread of the runtime, the exception ends the process.
        return too_large("the model", str(model), InputError, memory)
    if code < 0 and model is not None:
        steps = {"opens": f"while it opened {model.name}", "runs": f"while it ran {model.name}"}
        step = steps.get((done.stdout.strip().splitlines() or [""])[-1], f"in edgerun {command}")
        return CrashError(
            f"ONNX Runtime was killed by signal {named_signal(-code)} {step}{wrote}",
            signal=-code,
            remedy=remedy,
        )
    ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return TargetError(f"edgerun {command} {ending}{wrote}", where=target, remedy=remedy)


def reported_error(stderr: str) -> dict[str, Any] | None:
    """The error that edgerun reported as a JSON line (see :meth:`EdgerunError.report`), or None."""
    for line in reversed(stderr.splitlines()):
        if line.startswith('{"edgerun_error": '):
            reported: dict[str, Any] = json.loads(line)["edgerun_error"]
            return reported
    return None
