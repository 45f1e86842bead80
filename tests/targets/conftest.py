"""An SSH server on this machine that stands for a board."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgekd.config.targets import TargetConfig
from edgekd.targets import SshTarget

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")

CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
"""


def make_key(path: Path) -> Path:
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    return path


@dataclass
class Board:
    folder: Path
    port: int
    opened: list[SshTarget] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.folder / "board"

    @property
    def lock(self) -> Path:
        return self.folder / "lease"

    def settings(self, **changes):
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "key": str(self.folder / "id"),
            "known_hosts": str(self.folder / "known hosts"),
            "python": sys.executable,
            "folder": str(self.work),
            "lock": str(self.lock),
            "grace_seconds": 10,
            **changes,
        }

    def target(self, say=lambda text: None, **changes):
        self.opened.append(SshTarget("board", TargetConfig(**self.settings(**changes)), say))
        return self.opened[-1]

    def script(self, name: str, *lines: str) -> str:
        path = self.folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
        return str(path)


@pytest.fixture
def board(server):
    """The board; connections of a test end with it."""
    yield server
    while server.opened:
        server.opened.pop().close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("sshd")) as started:
        yield started


@contextmanager
def start_server(folder: Path):
    """A server with its own keys on a free port, ended by its process id."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("there is no sshd or ssh on this machine (apt install openssh-server)")
    make_key(folder / "host")
    shutil.copy(f"{make_key(folder / 'id')}.pub", folder / "authorized_keys")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(CONFIG.format(port=port, folder=folder))
    host = (folder / "host.pub").read_text()
    (folder / "known hosts").write_text(f"[127.0.0.1]:{port} {host}")
    words = [SSHD, "-f", str(folder / "config"), "-E", str(folder / "log")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    pid = folder / "sshd.pid"
    for _ in range(100):
        if pid.is_file() and pid.read_text().strip():
            break
        time.sleep(0.05)
    else:
        pytest.skip(f"sshd does not start: {done.stderr}{(folder / 'log').read_text()}")
    try:
        yield Board(folder, port)
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
