"""A connection to a device: one ``ssh`` process that carries requests to ``edgerun/device.py``.

The system's OpenSSH client is used and not asyncssh: it follows the user's configuration
completely (``Match exec``, ``ProxyJump``, agents, hardware keys, certificates), is on every
machine from which a device is reached by hand, and adds no dependency (asyncssh brings 20 MB of
cryptography and 0.4 s of imports).
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from edgekd.config.targets import TargetConfig
from edgekd.errors import TargetError
from edgekd.files import edgerun_folder
from edgerun.device import READY

SHELL = "edgekd-shell"
"""What the shell there prints first: a later end is not OpenSSH's own, whose exit code 255 is
also that of commands."""
CONNECT_SECONDS = 15
ANSWER_SECONDS = 120.0
OLD_PYTHON = 97
_MOST_NOISE = 1 << 20
"""Bytes that the start-up files of a shell there may print."""

# On one line, which every shell quotes alike.
_BOOT = (
    f"import sys; sys.version_info >= (3, 8) or sys.exit({OLD_PYTHON}); "
    "exec(compile(sys.stdin.buffer.read({size}), 'edgerun/device.py', 'exec'))"
)


class CannotConnect(TargetError):
    """There is no connection.

    Args:
        passes: whether another attempt may succeed.
    """

    def __init__(self, what: str, where: str, remedy: str, passes: bool = False) -> None:
        self.passes = passes
        super().__init__(what, where=where, remedy=remedy)


class ConnectionLost(Exception):
    """The connection ended, or nothing was answered for too long."""


class DeviceRefused(Exception):
    """The device's answer to a request is an error: its kind, and what went wrong."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind, self.what = kind, what


class _Cause(NamedTuple):
    """What a message of OpenSSH means, and whether another attempt may succeed."""

    pattern: str
    what: str
    remedy: str
    passes: bool = False


_CAUSES = (
    _Cause(
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host key of {host} has changed: it is another machine, was installed anew, or "
        "somebody is in between",
        "if it was installed anew: ssh-keygen -R '{known}'{file}, then connect once with ssh and "
        "compare the fingerprint",
    ),
    _Cause(
        r"Host key verification failed|No \S+ host key is known",
        "the host key of {host} is not known here",
        "connect once by hand and compare the fingerprint: {ssh}",
    ),
    _Cause(
        r"Permission denied|Too many authentication failures|No supported authentication",
        "{host} does not accept the key",
        "{ssh} must work without a password: give the key (key: in the file of targets, an agent, "
        "IdentityFile), or install it there: ssh-copy-id",
    ),
    _Cause(
        r"Could not resolve hostname",
        "there is no machine named {host}",
        "check the name or give an address",
        True,
    ),
    _Cause(
        r"Connection refused",
        "{host} refuses the connection: no SSH server listens there",
        "check the port; on the device: sudo apt install openssh-server",
        True,
    ),
    _Cause(
        r"timed out|No route to host|Network is unreachable|Host is down",
        "{host} does not answer",
        "check that it is switched on and in this network",
        True,
    ),
    _Cause(
        r"Bad configuration option|Bad owner or permissions|terminating, \d+ bad configuration|"
        r"UNPROTECTED PRIVATE KEY|Can't open user config",
        "OpenSSH does not accept its configuration or the key's file",
        "fix what it says",
    ),
)


def failure_of(said: str, target: str, config: TargetConfig) -> CannotConnect:
    """The error for a connection that OpenSSH could not make.

    Args:
        said: what ``ssh`` wrote on standard error.
        target: the target's name, for the error.
        config: its settings.
    """
    last = " / ".join(line.strip() for line in said.strip().splitlines()[-3:]) or "nothing"
    port = f"[{config.host}]:{config.port}" if config.port not in (None, 22) else config.host
    names = {
        "host": config.address,
        "known": port,
        "file": f" -f {shlex.quote(config.known_hosts)}" if config.known_hosts else "",
        "ssh": shlex.join(["ssh", *_options(config), config.host]),
    }
    for cause in _CAUSES:
        if re.search(cause.pattern, said):
            what = f"{cause.what.format(**names)} (ssh: {last})"
            return CannotConnect(what, target, cause.remedy.format(**names), cause.passes)
    what = f"the connection to {config.address} ended before a command ran there (ssh: {last})"
    return CannotConnect(what, target, f"try by hand: {names['ssh']}", True)


def _options(config: TargetConfig) -> list[str]:
    """The options that the target's settings mean."""
    words: list[str] = []
    if config.ssh_config:
        words += ["-F", str(Path(config.ssh_config).expanduser())]
    if config.port is not None:
        words += ["-p", str(config.port)]
    if config.user is not None:
        words += ["-l", config.user]
    if config.key:
        words += ["-i", str(Path(config.key).expanduser()), "-o", "IdentitiesOnly=yes"]
    if config.known_hosts:
        file = str(Path(config.known_hosts).expanduser()).replace("%", "%%")
        words += ["-o", f'UserKnownHostsFile="{file}"', "-o", "GlobalKnownHostsFile=/dev/null"]
    return words


_ALWAYS = {
    "BatchMode": "yes",  # no question that nobody would answer
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": str(CONNECT_SECONDS),
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "ControlMaster": "no",  # one of the user's is used, none is left behind
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "LogLevel": "ERROR",
}


def ssh_words(config: TargetConfig, command: str) -> list[str]:
    """The call of ``ssh`` that runs a command of a shell there."""
    options = [word for key, value in _ALWAYS.items() for word in ("-o", f"{key}={value}")]
    return ["ssh", "-T", *_options(config), *options, "--", config.host, command]


def device_command(config: TargetConfig, size: int) -> str:
    """The command that starts ``device.py``, of which ``size`` bytes follow on standard input.

    It is quoted for whatever the login shell is; what varies later is sent as data.
    """
    python = f"{config.folder}/venv/bin/python"
    if config.python is None:
        choice = f'p={_home_path(python)}; [ -x "$p" ] || p=python3'
    else:
        choice = f"p={_home_path(config.python)}"
    script = (
        f"printf '{SHELL}\\n'; {choice}; PYTHONUTF8=1; export PYTHONUTF8; unset PYTHONPATH "
        f'PYTHONHOME PYTHONSTARTUP; exec "$p" -u -c {shlex.quote(_BOOT.format(size=size))}'
    )
    return f"exec sh -c {shlex.quote(script)}"


def _home_path(path: str) -> str:
    """A path for a shell, in which a leading ``~/`` is the home folder."""
    if path.startswith("~/"):
        return f'"$HOME"/{shlex.quote(path[2:])}'
    return shlex.quote(path)


class Connection:
    """One ``ssh`` process with ``device.py`` on its other end.

    Raises:
        CannotConnect: the device could not be reached, or has no Python that is new enough.
    """

    def __init__(self, target: str, config: TargetConfig) -> None:
        self.target, self.config = target, config
        self._number, self._interrupted = 0, False
        if shutil.which("ssh") is None:
            raise CannotConnect(
                "there is no SSH client on this machine",
                target,
                "install OpenSSH (Debian: apt install openssh-client)",
            )
        source = (edgerun_folder() / "device.py").read_bytes()
        # In a session of its own, so that Ctrl-C leaves it to end the job there.
        self._process = subprocess.Popen(
            ssh_words(config, device_command(config, len(source))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._said = bytearray()
        self._buffer = bytearray()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self._start(source)
        except BaseException:
            self.close()
            raise

    def _start(self, source: bytes) -> None:
        in_shell = False
        try:
            limit = time.monotonic() + CONNECT_SECONDS + 30
            noise = 0
            while not in_shell:
                line = self._line(limit)
                noise += len(line)
                in_shell = line.decode(errors="replace").strip().endswith(SHELL)
                if noise > _MOST_NOISE:
                    raise ConnectionLost("the shell there prints without end")
            self._write(source)
            ready = self._line(limit + 30).decode(errors="replace")
            if not ready.startswith(READY):
                raise ConnectionLost(f"instead of {READY} came {ready[:80]!r}")
        except ConnectionLost as lost:
            raise self._not_started(in_shell, lost) from lost

    def _not_started(self, in_shell: bool, lost: ConnectionLost) -> CannotConnect:
        code = self.close()
        said = self._said.decode(errors="replace")
        where, python = self.target, self.config.python or "python3"
        if not in_shell:
            return failure_of(said or str(lost), where, self.config)
        remedy = (
            "install Python 3.8 or later there (Debian: sudo apt install python3), or name one: "
            "python: in the file of targets"
        )
        last = " / ".join(line.strip() for line in said.strip().splitlines()[-3:])
        if code in (126, 127):
            what = f"there is no {python} on {self.config.address} ({last})"
            return CannotConnect(what, where, remedy)
        if code == OLD_PYTHON:
            what = f"{python} on {self.config.address} is older than 3.8"
            return CannotConnect(what, where, remedy)
        what = f"{python} did not start on {self.config.address}: {last or lost}"
        return CannotConnect(what, where, "try it there by hand", True)

    def request(
        self,
        do: str,
        content: bytes = b"",
        *,
        seconds: float = ANSWER_SECONDS,
        **fields: Any,
    ) -> Any:
        """Send a request and wait for its answer: a JSON value, or bytes.

        Raises:
            ConnectionLost: the connection ended, or there is no answer in this time.
            DeviceRefused: the answer is an error.
        """
        self._number += 1
        size = {"size": len(content)} if content else {}
        header = json.dumps({"id": self._number, "do": do, **fields, **size})
        self._write(header.encode() + b"\n" + content)
        limit = time.monotonic() + seconds
        while True:
            answer, data = self._answer(limit)
            if answer["id"] == self._number:  # not that of an interrupted request
                break
        if "error" in answer:
            raise DeviceRefused(answer["error"], answer["what"])
        return data if answer["size"] else answer["ok"]

    def _answer(self, limit: float) -> tuple[dict[str, Any], bytes]:
        """The next answer; an interruption leaves it in the buffer."""
        while True:
            end = self._buffer.find(b"\n") + 1
            if end:
                answer: dict[str, Any] = json.loads(self._buffer[:end])
                complete = end + answer.get("size", 0)
                if len(self._buffer) >= complete:
                    data = bytes(self._buffer[end:complete])
                    del self._buffer[:complete]
                    return answer, data
            self._fill(limit)

    def close(self) -> int | None:
        """End the connection; the exit code of ``ssh``."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was not sent is lost with the connection
                    stream.close()
        try:
            code = process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._listener.join(2)
        if process.stderr is not None and not self._listener.is_alive():
            process.stderr.close()
        return code

    def _listen(self) -> None:
        """Read what ``ssh`` writes on standard error, so that it never waits; the end is kept."""
        assert self._process.stderr is not None
        while block := self._process.stderr.read(4096):
            self._said += block
            del self._said[:-20_000]

    def _write(self, content: bytes) -> None:
        assert self._process.stdin is not None
        if self._interrupted:
            raise ConnectionLost("it was interrupted in the middle of a request")
        view = memoryview(content)
        self._interrupted = True
        try:
            while view:
                view = view[self._process.stdin.write(view) or 0 :]
        except OSError as error:
            raise ConnectionLost(self._last_words()) from error
        self._interrupted = False

    def _line(self, limit: float) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            self._fill(limit)
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def _fill(self, limit: float) -> None:
        assert self._process.stdout is not None
        number = self._process.stdout.fileno()
        if not select.select([number], [], [], max(0.0, limit - time.monotonic()))[0]:
            raise ConnectionLost("it did not answer in time")
        block = os.read(number, 1 << 20)
        if not block:
            raise ConnectionLost(self._last_words())
        self._buffer += block

    def _last_words(self) -> str:
        lines = self._said.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it ended"
