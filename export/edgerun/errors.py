"""Errors for users: what is wrong, where, and the remedy."""

from __future__ import annotations


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
