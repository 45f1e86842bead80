"""The process of a command: its streams and signals, and the report of an unexpected error."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import os
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from edgekd.errors import StageError, printable

REPORTS = 20
"""Number of error reports that are stored; older ones are removed."""

_LIBRARIES = ("edgekd", "numpy", "torch", "onnx", "onnxruntime", "pydantic", "click", "rich")


class _Stream(io.FileIO):
    """A standard stream; what cannot be written, as to a closed pipe, is discarded."""

    failed = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if not self.failed and error.errno != errno.EPIPE:
                lost = f"edgekd: output is lost: {error.strerror}\n"
                with suppress(OSError):
                    os.write(2, lost.encode())
            self.failed = True
            return len(data)


_UNSAFE = re.compile(
    r"\x1b(?!\[([0-9;]*m|[0-9]*A|2K|\?25[hl]))|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]"
    r"|[\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
"""Control characters and sequences but those of colors and of progress bars."""


class _Text(io.TextIOWrapper):
    """Text of a standard stream, in which names from data cannot control the terminal."""

    def write(self, text: str) -> int:
        return super().write(_UNSAFE.sub(lambda found: printable(found[0]), text))


def protect_streams() -> None:
    """Keep the exit code with a closed pipe, a full disk, a terminal without a character.

    Standard streams that were closed are replaced by the null device, so that no file that is
    opened later becomes one of them.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        buffer = io.BufferedWriter(_Stream(number, "wb", closefd=False))
        stream = _Text(
            buffer,
            encoding=old.encoding if old else "utf-8",
            errors="backslashreplace",
            line_buffering=old.line_buffering if old else False,
        )
        setattr(sys, name, stream)


terminated = False
"""Whether the interruption of this process was a SIGTERM."""


def interrupt_on_sigterm() -> None:
    """Have SIGTERM end a command as Ctrl-C does; a second one ends the process at once."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global terminated
    terminated = True
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def unexpected(error: BaseException) -> StageError:
    """The error to show for one that no part of the project expects; a file gets its traceback."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else f"{text[:200]}…"
    return StageError(
        f"edgekd failed unexpectedly: {type(error).__name__}{': ' * bool(text)}{text}",
        where=_write_report(error),
        remedy="report this with that file, which has the versions and the traceback; "
        "'edgekd --debug COMMAND …' shows it here",
    )


def _write_report(error: BaseException) -> str | None:
    versions = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    lines = [f"command: {' '.join(map(repr, sys.argv))}"]
    lines += [f"{name}: {version}" for name, version in versions.items()]
    lines += ["", *traceback.format_exception(error)]
    cache = os.environ.get("XDG_CACHE_HOME")
    # Where there is no home to write to, the folder of temporary files remains.
    for place in (Path(cache) if cache else Path("~/.cache"), Path(tempfile.gettempdir())):
        with suppress(OSError, RuntimeError):
            folder = place.expanduser() / "edgekd" / "errors"
            folder.mkdir(parents=True, exist_ok=True)
            for old in sorted(folder.glob("*.txt"))[: 1 - REPORTS]:
                old.unlink(missing_ok=True)
            file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
            file.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
            return str(file)
    return None
