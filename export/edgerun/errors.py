"""Errors for users: what is wrong, where, and the remedy."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TextIO

AS_JSON = "EDGERUN_ERRORS"
"""With this environment variable set to ``json``, an error is one JSON line for a program."""


class EdgerunError(Exception):
    """Base of all errors of edgerun; printed without a traceback.

    Args:
        what: what is wrong, without a full stop at its end.
        where: the file, input or option it concerns.
        remedy: what the user can do.
    """

    exit_code = 3

    def __init__(self, what: str, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  to do: {self.remedy}")
        return "\n".join(lines)

    def report(self) -> int:
        """Print the error on standard error, as text or as one JSON line; returns the exit code.

        The line is ``{"edgerun_error": {"what", "where", "remedy", "code"}}``.
        """
        text = printable(f"edgerun: {self}")
        if os.environ.get(AS_JSON) == "json":
            fields = {"what": self.what, "where": self.where, "remedy": self.remedy}
            text = json.dumps({"edgerun_error": {**fields, "code": self.exit_code}})
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:  # the exit code remains
            discard(sys.stderr)
        return self.exit_code


def discard(stream: TextIO) -> None:
    """Drop what a stream could not write: Python would try again, and end with another code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class BadInput(EdgerunError):
    """The user's input (model, inputs, option) is wrong."""

    exit_code = 2


class RunFailed(EdgerunError):
    """The runtime failed."""

    exit_code = 3


class NoDevice(RunFailed):
    """This machine cannot run an engine: no GPU, driver or CUDA library."""


class CannotWrite(EdgerunError):
    """A file cannot be written: no space, no permission."""

    exit_code = 5


_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text for a terminal or a log: control characters, which could move its cursor or hide
    what follows, as escapes such as ``\\x1b``; line breaks and tabs stay.
    """
    return _CONTROL.sub(lambda found: repr(found.group(0))[1:-1], text)


def is_utf8(text: str) -> bool:
    """Whether a text, such as a file name, can be written in UTF-8; the runtimes take no other."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
