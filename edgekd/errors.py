"""The errors of the project: what is wrong, where, and the remedy.

The command line prints one of these without a traceback and exits with its exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from edgerun.errors import BadInput, EdgerunError, is_utf8, printable

__all__ = [
    "CrashError",
    "EdgekdError",
    "GateFailed",
    "InputError",
    "StageError",
    "TargetError",
    "edgerun_errors",
    "is_utf8",
    "nearest",
    "printable",
    "unknown_name",
]


class EdgekdError(EdgerunError):
    """Base of all errors of the project.

    Args:
        what: what is wrong, as a sentence without a full stop at its end.
        where: the file, key, line or layer it concerns.
        remedy: what the user can do about it.
    """


class GateFailed(EdgekdError):
    """The artifact was made and measured, and does not meet its budgets."""

    exit_code = 1


class InputError(EdgekdError):
    """The user's input (YAML, data, checkpoint, model, option) is wrong."""

    exit_code = 2


class StageError(EdgekdError):
    """A stage could not do its work: training diverged, parity failed, the disk is full."""

    exit_code = 3


class CrashError(StageError):
    """A runtime's native code crashed its process.

    Args:
        signal: the number of the signal that ended it.
    """

    def __init__(
        self, what: str, *, signal: int, where: str | None = None, remedy: str | None = None
    ) -> None:
        self.signal = signal
        super().__init__(what, where=where, remedy=remedy)


class TargetError(EdgekdError):
    """The machine to measure on could not be reached or could not run the model."""

    exit_code = 4


@contextmanager
def edgerun_errors() -> Iterator[None]:
    """Raise the errors of edgerun, whose functions are called in this process, as this package's.

    Raises:
        InputError: for its BadInput.
        StageError: for all others.
    """
    try:
        yield
    except BadInput as error:
        raise InputError(error.what, where=error.where, remedy=error.remedy) from error
    except EdgerunError as error:
        raise StageError(error.what, where=error.where, remedy=error.remedy) from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a misspelt one, or None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(
    kind: str, name: str, known: Iterable[str], where: str | None = None
) -> InputError:
    """The error for an unknown name, with the nearest known one as a suggestion."""
    choices = sorted(known)
    guess = nearest(name, choices)
    hint = f"did you mean {guess!r}? " if guess else ""
    return InputError(
        f"there is no {kind} named {name!r}",
        where=where,
        remedy=f"{hint}known: {', '.join(choices)}",
    )
