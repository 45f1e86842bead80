"""The target that is reached by SSH: edgerun on another machine, with the files of this one."""

from __future__ import annotations

import json
import os
import posixpath
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import InputError, TargetError, edgerun_errors
from edgekd.files import atomic_write, file_sha256
from edgekd.targets.connection import DeviceRefused
from edgekd.targets.local import (
    EdgerunTarget,
    edgerun_variables,
    error_of,
    real_files,
    reported_error,
)
from edgekd.targets.remote import Job, RemoteMachine
from edgerun.cli import command_words
from edgerun.errors import CannotWrite, EdgerunError
from edgerun.files import is_engine, model_files, sha256
from edgerun.limits import CALL, MEMORY
from edgerun.manifest import manifest_beside
from edgerun.process import OUT_OF_MEMORY, named_signal

MODELS = ("model", "against")
WRITTEN = ("json", "output", "engine", "timing_cache")
"""Settings that are files which edgerun writes; a timing cache is read, too."""
LEASED = ("bench", "run", "probe", "build")
"""Commands that need the machine alone."""


class SshTarget(RemoteMachine, EdgerunTarget):
    """Runs edgerun on a machine that is reached by SSH.

    The methods are those of :class:`edgekd.targets.target.Target`, and raise TargetError besides
    where the machine cannot be reached, lacks something, or ended what ran.
    """

    def _edgerun(self, command: str, model: Path | None, settings: Mapping[str, Any]) -> None:
        file, files = real_files(model, settings)
        engine = file is not None and is_engine(file)
        onnx = command in ("bench", "run", "probe") and not engine
        self.check_runtime("numpy", *(("onnxruntime",) if onnx else ()))
        if command == "bench" and self.config.power_mode is not None:
            self._check_power_mode(self.config.power_mode)
        job = Job((), command, leased=command in LEASED)
        root = f"{self.hello()['folder']}/jobs/{job.id}"
        given = files if file is None else {"model": file, **files}
        places = {key: _place(job, key, path) for key, path in given.items()}
        there = {key: Path(f"{root}/{place}") for key, place in places.items()}
        named = {key: path for key, path in there.items() if key != "model"}
        words = command_words(command, there.get("model"), {**settings, **named})
        job.words = ["{python}", "-m", "edgerun", *words]
        passed = {name: os.environ[name] for name in (MEMORY, CALL) if os.environ.get(name)}
        job.environment = {
            "PYTHONPATH": self.send_edgerun(),
            "PYTHONUTF8": "1",
            **edgerun_variables(settings.get("threads")),
            **passed,
        }
        local = {f"{root}/{place}": str(given[key]) for key, place in places.items()}
        written = {f"{key}/{given[key].name}": given[key] for key in WRITTEN if key in given}
        done = self.run_job(job, lambda: self._fetch(job, written, local))
        if done.returncode != 0:
            raise self._explain(command, done, file if onnx else None, local)

    def _explain(
        self,
        command: str,
        done: subprocess.CompletedProcess[str],
        model: Path | None,
        local: Mapping[str, str],
    ) -> EdgerunError:
        """The error of edgerun there, in terms of the files here."""
        reported = reported_error(done.stderr)
        if reported is None and done.returncode in (-9, -15):
            return TargetError(
                f"edgerun {command} was killed there by signal {named_signal(-done.returncode)}",
                where=self.name,
                remedy=OUT_OF_MEMORY,
            )
        error = error_of(command, done, model, target=self.name)
        if reported is not None and reported["code"] == CannotWrite.exit_code:
            error = TargetError(error.what, where=self.name, remedy=error.remedy)
        for name in ("what", "where", "remedy"):
            text = getattr(error, name)
            setattr(error, name, None if text is None else _replaced(text, local))
        error.args = (str(error),)
        return error

    def check_runtime(self, *needed: str) -> None:
        """Check that these modules, numpy and onnxruntime by default, are installed there.

        Raises:
            TargetError: one is not, or the machine cannot be reached.
        """
        hello = self.hello()
        lacking = [m for m in needed or ("numpy", "onnxruntime") if m not in hello["modules"]]
        if lacking:
            raise TargetError(
                f"{hello['python']} there has no {' and no '.join(lacking)}",
                where=self.name,
                remedy=f"edgekd target bootstrap {self.name}",
            )

    def _check_power_mode(self, wanted: str) -> None:
        board = self.board()
        found = [board[key] for key in ("nvpmodel", "governor") if board.get(key)]
        if wanted not in found:
            raise TargetError(
                f"its power mode is {' / '.join(found) or 'not readable'}, not {wanted}",
                where=self.name,
                remedy="set it there (sudo nvpmodel -m …, sudo cpupower frequency-set -g …), or "
                "change power_mode in the file of targets",
            )

    def _fetch(self, job: Job, written: Mapping[str, Path], local: Mapping[str, str]) -> None:
        """Bring back what a job wrote: each file, and those that it wrote next to it."""
        try:
            for place, size, digest in self.ask("list", job=job.id, under="out"):
                key, _, name = place.partition("/")
                here = written.get(place)
                if here is None:
                    beside = next(path for at, path in written.items() if at.startswith(f"{key}/"))
                    here = beside.parent / name
                with atomic_write(here, "the result") as partial:
                    self.download(job, f"out/{place}", size, partial)
                    if sha256(partial) != digest:
                        raise TargetError(
                            f"{name} arrived with another SHA-256 than it has there",
                            where=self.name,
                            remedy="check the disks and the memory of both machines",
                        )
                    if place.endswith(".json"):
                        record = json.loads(partial.read_text(encoding="utf-8"))
                        partial.write_text(json.dumps(_renamed(record, local)), encoding="utf-8")
        except DeviceRefused as refused:
            raise self.refused(refused) from refused


def _place(job: Job, key: str, path: Path) -> str:
    """Where a file of a call is there; what has to be sent for it is added to the job."""
    place = f"in/{key}/{path.name}"
    if key in WRITTEN:
        place = f"out/{key}/{path.name}"
        job.folders.add(f"out/{key}")
        if key == "timing_cache" and path.is_file():
            job.sent[place] = path
            job.changed.add(place)
        return place
    job.sent[place] = path
    if key in MODELS:
        if not path.is_file():
            file_sha256(path)  # its errors are those of a missing file
            raise InputError("there is no such file", where=str(path), remedy="check the path")
        record = path.with_name(f"{path.name}.json")
        if is_engine(path) and record.is_file():
            job.sent[f"in/{key}/{record.name}"] = record
        for part in model_files(path)[1:]:
            beside = posixpath.relpath(part, path.parent)
            if beside.startswith("../"):
                raise InputError(
                    f"its weights are outside of its folder: {part}",
                    where=str(path),
                    remedy="put them next to the model, and write it again",
                )
            job.sent[f"in/{key}/{beside}"] = part
        with edgerun_errors():
            manifest = manifest_beside(path)
        if manifest is not None:
            job.sent[f"in/{key}/manifest.json"] = path.parent / "manifest.json"
    return place


def _replaced(text: str, local: Mapping[str, str]) -> str:
    for there, here in local.items():
        text = text.replace(there, here)
    return text


def _renamed(value: Any, local: Mapping[str, str]) -> Any:
    """A record with the paths of this machine."""
    if isinstance(value, str):
        return _replaced(value, local)
    if isinstance(value, dict):
        return {key: _renamed(item, local) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, local) for item in value]
    return value
