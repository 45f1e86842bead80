"""A machine that is reached by SSH: files are sent once, edgerun runs there detached.

``edgerun/device.py`` runs on the other end of the connection and describes the files and the jobs.
"""

from __future__ import annotations

import atexit
import getpass
import io
import json
import os
import posixpath
import socket
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgekd.config.targets import TargetConfig
from edgekd.errors import EdgekdError, InputError, TargetError, edgerun_errors
from edgekd.files import atomic_write, edgerun_folder, file_sha256, write_errors
from edgekd.targets.connection import CannotConnect, Connection, ConnectionLost, DeviceRefused
from edgekd.targets.local import (
    EdgerunTarget,
    edgerun_variables,
    error_of,
    real_files,
    reported_error,
)
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
WAIT_SECONDS = 10.0
FIRST_BLOCK, LARGEST_BLOCK = 1 << 16, 1 << 22
QUICK, SLOW = 0.3, 3.0
"""A block of a file that is sent in fewer seconds is followed by a larger one; in more, by a
smaller one."""


@dataclass
class Job:
    """What runs on a device: its words (``{python}``: the Python there), and its files.

    Paths there are below the job's folder; ``out`` holds what it writes.
    """

    words: Sequence[str]
    command: str
    sent: dict[str, Path] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """Those of ``sent`` that the job changes."""
    folders: set[str] = field(default_factory=lambda: {"out"})
    environment: Mapping[str, str] = field(default_factory=dict)
    leased: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class SshTarget(EdgerunTarget):
    """A machine that is reached by the system's OpenSSH client.

    The methods are those of :class:`edgekd.targets.target.Target`, and raise TargetError besides
    where the machine cannot be reached, lacks something, or ended what ran.

    Args:
        name: as the user wrote it.
        config: how it is reached, and where it works.
        say: called with what the user should know while waiting.
    """

    def __init__(
        self, name: str, config: TargetConfig, say: Callable[[str], None] = _say
    ) -> None:
        self.name, self.config, self.say = name, config, say
        self.sent = 0
        """Bytes of files that were sent."""
        self._connection: Connection | None = None
        self._hello: dict[str, Any] = {}
        atexit.register(self.close)

    def close(self) -> None:
        """End the connection; the next call makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def hello(self) -> dict[str, Any]:
        """The machine: ``host``, ``machine``, ``model``, ``identity`` (a hash of its machine-id),
        ``python``, ``version``, ``libc``, ``modules``, and the absolute ``folder``."""
        if self._connection is None:
            self._connect()
        return self._hello

    def identity(self) -> list[Any]:
        """What the machine is, for a fingerprint: another one has another identity."""
        hello = self.hello()
        return [hello[key] for key in ("host", "machine", "model", "identity")]

    def board(self) -> dict[str, Any]:
        """What :func:`edgerun.board.describe_board` says there."""
        answer: dict[str, Any] = self.ask("board", edgerun=self._send_edgerun())
        return answer

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
            "PYTHONPATH": self._send_edgerun(),
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

    def run_job(
        self, job: Job, fetch: Callable[[], None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Send a job's files, run it there, wait for its end, and bring its files back.

        Args:
            job: what to run.
            fetch: called after it ended well, before its folder there is removed.

        Raises:
            TargetError: it could not be started, or was ended by anything but itself.
        """
        digests = {place: file_sha256(path) for place, path in job.sent.items()}
        config = self.config
        task = {
            "words": list(job.words),
            "environment": dict(job.environment),
            "files": [[place, digest, place in job.changed] for place, digest in digests.items()],
            "folders": sorted(job.folders),
            "limit": config.limit_seconds,
            "grace": config.grace_seconds,
            "wait": config.wait_seconds,
            "lock": config.lock if job.leased else None,
            "owner": f"{getpass.getuser()}@{socket.gethostname()} (edgekd {job.command}, process "
            f"{os.getpid()})",
        }
        try:
            for last in (False, False, True):
                self.send({digests[place]: path for place, path in job.sent.items()})
                try:
                    self.ask("start", job=job.id, **task)
                    break
                except DeviceRefused as refused:
                    if last or refused.kind != "missing":
                        raise self._refused(refused) from refused
            state = self._wait(job)
            done = subprocess.CompletedProcess(
                job.words, state["returncode"], state["stdout"], state["stderr"]
            )
            if done.returncode == 0 and fetch is not None:
                fetch()
            return done
        finally:
            self._end(job)

    def _end(self, job: Job) -> None:
        """Stop the job and remove its folder; where that fails, the device does it by itself."""
        for _ in range(2):
            with suppress(ConnectionLost, DeviceRefused, EdgekdError):
                if self._connection is None:
                    self._connect()
                assert self._connection is not None
                self._connection.request(
                    "end", job=job.id, keep_mb=self.config.cache_mb, seconds=15
                )
                return
            self.close()

    def _wait(self, job: Job) -> dict[str, Any]:
        """The state of a job that has ended by itself."""
        config, before = self.config, None
        until = time.monotonic() + config.wait_seconds + config.limit_seconds + 60
        while True:
            try:
                state: dict[str, Any] = self.ask("wait", job=job.id, most=WAIT_SECONDS)
            except DeviceRefused as refused:
                raise self._refused(refused) from refused
            if state["state"] == "ended":
                break
            if state["state"] == "waiting" and (held := _held(state["holder"])) != before:
                self.say(f"waiting for {self.name}: in use by {held}")
                before = held
            if time.monotonic() > until:
                state["why"] = "limit"
                break
        why = state["why"]
        if why is None:
            return state
        text = {
            "leased": f"it is in use by {_held(state.get('holder'))}, also after "
            f"{config.wait_seconds:g} s",
            "limit": f"edgekd's command did not end within {config.limit_seconds:g} s and was "
            "stopped",
            "abandoned": "the command was stopped there, as the connection was lost for more than "
            f"{config.grace_seconds:g} s",
            "start": f"edgerun could not be started there: {state.get('what')}",
            "supervisor": "the process that supervises the command was killed there"
            + (f": {state['what'].strip().splitlines()[-1]}" if state.get("what") else ""),
        }[why]
        remedy = {
            "leased": "try later, or set wait_seconds in the file of targets",
            "limit": "set limit_seconds in the file of targets, or measure less",
            "abandoned": "run again, or set grace_seconds in the file of targets",
            "start": "check python in the file of targets",
            "supervisor": OUT_OF_MEMORY,
        }[why]
        raise TargetError(text, where=self.name, remedy=remedy)

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
                    self._download(job, f"out/{place}", size, partial)
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
            raise self._refused(refused) from refused

    def _download(self, job: Job, place: str, size: int, to: Path) -> None:
        with write_errors(to, "the result"), to.open("wb") as file:
            while file.tell() < size:
                block = self.ask("read", job=job.id, path=place, offset=file.tell())
                if not block:
                    raise TargetError(f"{place} became shorter there", where=self.name)
                file.write(block)

    def _send_edgerun(self) -> str:
        """The folder there that has this version of edgerun."""
        digest, archive = edgerun_archive()
        self.send({digest: archive})
        folder: str = self.ask("unpack", digest=digest)
        return folder

    def send(self, contents: Mapping[str, Path | bytes]) -> None:
        """Send files by their SHA-256, as far as they are not there.

        Raises:
            InputError: a file cannot be read.
            TargetError: the disk there is full.
        """
        sizes = {key: _size(content) for key, content in contents.items()}
        try:
            for digest in self.ask("have", files=sizes):
                self._send(digest, contents[digest], sizes[digest])
        except DeviceRefused as refused:
            raise self._refused(refused) from refused

    def _send(self, digest: str, content: Path | bytes, size: int) -> None:
        """Send a file in blocks, from where an earlier connection ended."""
        block, again = FIRST_BLOCK, True
        offset = self.ask("have", files={digest: size}).get(digest, size)
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            while True:
                file.seek(offset)
                data = file.read(block)
                begin = time.monotonic()
                fields = {"digest": digest, "offset": offset, "total": size}
                try:
                    offset = self.ask("put", data, **fields)["offset"]
                except DeviceRefused as refused:
                    if refused.kind != "damaged" or not again:
                        raise
                    # A file that is changed meanwhile, or an earlier part of another one.
                    offset, again = 0, False
                    continue
                self.sent += len(data)
                if offset >= size:
                    return
                seconds = time.monotonic() - begin
                if seconds < QUICK:
                    block = min(2 * block, LARGEST_BLOCK)
                elif seconds > SLOW:
                    block = max(block // 2, 4096)

    def ask(self, do: str, content: bytes = b"", **fields: Any) -> Any:
        """Make a request; where the connection is lost, connect anew and repeat it.

        Raises:
            TargetError: there is no connection, or none again within ``grace_seconds``.
            DeviceRefused: the device's answer is an error that the caller may know how to handle.
        """
        until, pause = None, 0.2
        while True:
            problem: Exception
            try:
                if self._connection is None:
                    self._connect()
                assert self._connection is not None
                return self._connection.request(do, content, **fields)
            except ConnectionLost as lost:
                self.close()
                until = until or time.monotonic() + self.config.grace_seconds
                problem = TargetError(
                    f"the connection was lost, and not made again within "
                    f"{self.config.grace_seconds:g} s: {lost}",
                    where=self.name,
                    remedy="check the network, and run again",
                )
            except CannotConnect as error:
                if until is None or not error.passes:
                    raise
                problem = error
            if time.monotonic() + pause > until:
                raise problem
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _connect(self) -> None:
        connection = Connection(self.name, self.config)
        try:
            hello = connection.request("hello", folder=self.config.folder)
        except ConnectionLost as lost:
            connection.close()
            raise CannotConnect(
                f"the connection ended at once: {lost}", self.name, "run again", True
            ) from lost
        except DeviceRefused as refused:
            connection.close()
            raise self._refused(refused) from refused
        if self._hello and self._hello["identity"] != hello["identity"]:
            connection.close()
            raise TargetError(
                f"another machine answers than before: {hello['host']}, not {self._hello['host']}",
                where=self.name,
                remedy="run again",
            )
        self._connection, self._hello = connection, hello

    def _refused(self, refused: DeviceRefused) -> TargetError:
        if refused.kind == "full":
            return TargetError(
                f"the disk there is full: {refused.what}",
                where=self.name,
                remedy=f"free space there, or name another folder than {self.config.folder} in "
                "the file of targets",
            )
        if refused.kind == "system":
            what = f"the working folder there cannot be used: {refused.what}"
            remedy = f"check {self.config.folder} there, or name another folder"
            return TargetError(what, where=self.name, remedy=remedy)
        what = f"the device cannot do that: {refused.what}"
        return TargetError(what, where=self.name, remedy="run again")


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


def _size(content: Path | bytes) -> int:
    if isinstance(content, bytes):
        return len(content)
    with write_errors(content, "the file"):
        return content.stat().st_size


def _held(holder: Mapping[str, Any] | None) -> str:
    if not holder or not holder.get("owner"):
        return "somebody"
    since = holder.get("since")
    known = isinstance(since, int | float)
    return f"{holder['owner']}" + (
        f" since {time.strftime('%H:%M:%S', time.localtime(since))} of its clock" if known else ""
    )


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


@lru_cache
def edgerun_archive() -> tuple[str, bytes]:
    """The SHA-256 of a zip file of the package edgerun, and the file: the same for the same code."""
    folder, packed = edgerun_folder(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(_sources(folder)):
            entry = zipfile.ZipInfo(f"edgerun/{path.relative_to(folder).as_posix()}")
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    packed.seek(0)
    return sha256(packed), packed.getvalue()


def _sources(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.suffix in (".py", ".typed", ".json"))
