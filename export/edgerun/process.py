"""The process of a command: it ends with its parent, and what kills its runtime is reported."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, Callable, Optional

from edgerun.errors import RunFailed

PARENT = "EDGERUN_PARENT"
"""Environment variable: the number of the process with which this one has to end."""

OUT_OF_MEMORY = "it is often the system that ends a process so, for memory: free some"
"""The remedy for a process that was ended by SIGKILL."""

FORWARDED = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
"""Signals that ask a process to end; its child gets them, too."""


def end_with_parent(parent: Optional[int] = None) -> None:
    """Have the kernel (Linux) kill this process when its parent ends, which is ``parent``, or the
    one that ``PARENT`` names, if any.

    Otherwise the child of a process that was killed goes on measuring, and disturbs what is
    measured next.
    """
    if parent is None and os.environ.get(PARENT, "").isdigit():
        parent = int(os.environ[PARENT])
    if parent is None or sys.platform != "linux":
        return
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # It ended before that call.
        sys.exit(128 + signal.SIGKILL)


def forward_signals(child: int) -> None:
    """Pass signals on to a child, but the one that a terminal sends to both."""

    def forward(number: int, frame: Optional[FrameType]) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in FORWARDED:
        signal.signal(number, forward)


def named_signal(number: int) -> str:
    """``11`` → ``11 (SIGSEGV)``; without a name, the number alone."""
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)


def supervised(command: Callable[[], int]) -> int:
    """The exit code of a command that runs in a forked child, as a model may crash its runtime.

    It runs in this process where there is no ``fork``, and where a parent, which ``PARENT`` names,
    reports a crash by itself.
    """
    forking: Any = getattr(os, "fork", None)
    if forking is None or os.environ.get(PARENT):
        end_with_parent()
        return command()
    own = os.getpid()
    child: int = forking()
    if child == 0:
        end_with_parent(own)
        return command()
    forward_signals(child)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if number in (signal.SIGINT, *FORWARDED):
        return 128 + number
    lower = "a lower level of graph optimization (--optimization) may help, or another runtime"
    return RunFailed(
        f"the runtime was killed by signal {named_signal(number)}",
        remedy=OUT_OF_MEMORY if number == signal.SIGKILL else lower,
    ).report()
