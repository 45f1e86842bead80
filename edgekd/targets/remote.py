"""A machine that is reached by SSH: files are sent to it once, and jobs run there detached.

``edgerun/device.py`` runs on the other end of the connection and describes the files and the jobs.
"""

from __future__ import annotations

import atexit
import getpass
import io
import os
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
from edgekd.errors import EdgekdError, TargetError
from edgekd.files import edgerun_folder, file_sha256, write_errors
from edgekd.targets.connection import CannotConnect, Connection, ConnectionLost, DeviceRefused
from edgerun.files import sha256
from edgerun.process import OUT_OF_MEMORY

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


class RemoteMachine:
    """A machine that is reached by the system's OpenSSH client.

    Args:
        name: as the user wrote it.
        config: how it is reached, and where it works.
        say: called with what the user should know while waiting.
    """

    def __init__(self, name: str, config: TargetConfig, say: Callable[[str], None] = _say) -> None:
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
        answer: dict[str, Any] = self.ask("board", edgerun=self.send_edgerun())
        return answer

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
        task: dict[str, Any] = {
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
                        raise self.refused(refused) from refused
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
        known = "running"
        until = time.monotonic() + config.wait_seconds + config.limit_seconds + 60
        while True:
            try:
                state: dict[str, Any] = self.ask("wait", job=job.id, most=WAIT_SECONDS, known=known)
            except DeviceRefused as refused:
                raise self.refused(refused) from refused
            known = state["state"]
            if known == "ended":
                break
            if known == "waiting" and (held := _held(state["holder"])) != before:
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

    def download(self, job: Job, place: str, size: int, to: Path) -> None:
        """Bring a file of a job here, block by block.

        Raises:
            StageError: it cannot be written here.
        """
        with write_errors(to, "the result"), to.open("wb") as file:
            while file.tell() < size:
                block = self.ask("read", job=job.id, path=place, offset=file.tell())
                if not block:
                    raise TargetError(f"{place} became shorter there", where=self.name)
                file.write(block)

    def send_edgerun(self) -> str:
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
            raise self.refused(refused) from refused

    def _send(self, digest: str, content: Path | bytes, size: int) -> None:
        """Send a file in blocks, from where an earlier connection ended."""
        block, again = FIRST_BLOCK, True
        offset = self.ask("have", files={digest: size}).get(digest, size)
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            while True:
                file.seek(offset)
                data = file.read(block)
                begin = time.monotonic()
                try:
                    put = self.ask("put", data, digest=digest, offset=offset, total=size)
                    offset = put["offset"]
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
            raise self.refused(refused) from refused
        if self._hello and self._hello["identity"] != hello["identity"]:
            connection.close()
            raise TargetError(
                f"another machine answers than before: {hello['host']}, not {self._hello['host']}",
                where=self.name,
                remedy="run again",
            )
        self._connection, self._hello = connection, hello

    def refused(self, refused: DeviceRefused) -> TargetError:
        """The error for the user."""
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


@lru_cache
def edgerun_archive() -> tuple[str, bytes]:
    """A zip file of the package edgerun, the same for the same code: its SHA-256 and content."""
    folder, packed = edgerun_folder(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(_sources(folder)):
            entry = zipfile.ZipInfo(f"edgerun/{path.relative_to(folder).as_posix()}")
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    packed.seek(0)
    return sha256(packed), packed.getvalue()


def _sources(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.suffix in (".py", ".typed", ".json"))
