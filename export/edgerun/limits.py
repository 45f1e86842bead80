"""Limits on the memory and time of a process that opens a file of unknown origin."""

from __future__ import annotations

import math
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional, Type

from edgerun.errors import BadInput, EdgerunError

try:
    import resource
except ImportError:  # not on Windows, where nothing is limited
    resource = None  # type: ignore[assignment]

MEMORY = "EDGERUN_MEMORY_MB"
"""Environment variable: MB of 10⁶ bytes that such a process may allocate."""

SHARE = 0.9
"""The default: this share of the memory that is available when it starts."""

CALL = "EDGERUN_CALL_SECONDS"
"""Environment variable: seconds that one call of a runtime may take, to open or to run a model."""

CALL_SECONDS = 300.0

_limit: Optional[int] = None


def available_memory(root: Path = Path("/")) -> Optional[int]:
    """Bytes that processes can still use: those of the machine with its swap space, or of the
    control groups of this process where these have less; None where Linux does not say.
    """
    free = _numbers(root / "proc/meminfo", ":")
    if "MemAvailable" not in free:
        return None
    found = [(free["MemAvailable"] + free.get("SwapFree", 0)) * 1024]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be that outside, and the limit is at the top.
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            limit, used = (_text(folder / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                cached = _numbers(folder / "memory.stat", " ").get(names[2], 0)
                found.append(int(limit) - int(used) + cached)
            if folder == top:
                break
    return max(0, min(found))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(path: Path, separator: str) -> dict[str, int]:
    """The whole numbers of lines such as ``MemFree:  123 kB``."""
    pairs = (line.partition(separator) for line in _text(path).splitlines())
    words = {name: rest.split()[:1] for name, _, rest in pairs}
    return {name: int(rest[0]) for name, rest in words.items() if rest and rest[0].isdigit()}


def memory_limit() -> Optional[int]:
    """Bytes that a process may allocate which opens a file of unknown origin; None: not known.

    Raises:
        BadInput: the environment variable is no number above 0.
    """
    given = _given(MEMORY, "MB")
    if given is not None:
        return int(given * 1e6)
    available = available_memory()
    return None if available is None else int(available * SHARE)


def call_seconds() -> float:
    """Seconds that one call of a runtime may take.

    Raises:
        BadInput: the environment variable is no number above 0.
    """
    return _given(CALL, "seconds") or CALL_SECONDS


def _given(variable: str, unit: str) -> Optional[float]:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise BadInput(f"{text!r} is not a number of {unit} above 0", f"environment: {variable}")
    return value


def limit_memory(most: Optional[int] = None) -> None:
    """Limit what this process and those that it starts may allocate in addition to what they have:
    a larger allocation fails in them, before the system ends a process for memory.

    Nothing is limited where the system has no such limit. A lower limit remains.

    Args:
        most: bytes, if these are less than :func:`memory_limit`.

    Raises:
        BadInput: as :func:`memory_limit`.
    """
    global _limit
    known = [size for size in (memory_limit(), most) if size is not None]
    own = _numbers(Path("/proc/self/status"), ":").get("VmData")
    if resource is None or own is None or not known:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    set_before = [size for size in (soft, hard) if size != resource.RLIM_INFINITY]
    limit = min([own * 1024 + min(known), *set_before])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    _limit = limit - own * 1024


@contextmanager
def limited_memory(
    what: str,
    where: Optional[str] = None,
    error: Type[EdgerunError] = BadInput,
    most: Optional[int] = None,
) -> Iterator[None]:
    """:func:`limit_memory` for the body alone; what it cannot allocate is an error.

    Args:
        what: what needs the memory, such as "the checkpoint".
        where: the file.
        error: the kind of error to raise.
        most: as of :func:`limit_memory`.

    Raises:
        BadInput: (or ``error``) the body runs out of memory; or as :func:`memory_limit`.
    """
    global _limit
    before = None if resource is None else resource.getrlimit(resource.RLIMIT_DATA)
    limit_before = _limit
    limit_memory(most)
    try:
        yield
    except Exception as problem:
        if isinstance(problem, EdgerunError) or not is_out_of_memory(problem):
            raise
        raise too_large(what, where, error) from problem
    finally:
        _limit = limit_before
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def is_limited() -> bool:
    """Whether :func:`limit_memory` limits this process."""
    return _limit is not None


_ALLOCATION = ("bad_alloc", "allocate memory", "not enough memory")


def is_out_of_memory(error: object) -> bool:
    """Whether an error of Python, or the text of a C++ library, is of a failed allocation."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _ALLOCATION)


def too_large(
    what: str,
    where: Optional[str] = None,
    error: Type[EdgerunError] = BadInput,
    limit: Optional[int] = None,
) -> EdgerunError:
    """The error for a file that needs more memory than the limit, by default this process's."""
    limit = limit or _limit or memory_limit()
    most = "there is" if limit is None else f"{limit / 1e6:,.0f} MB"
    return error(
        f"{what} needs more memory than {most}",
        where=where,
        remedy="give a smaller one, or smaller inputs; free memory; or allow more with the "
        f"environment variable {MEMORY}",
    )


def too_slow(
    doing: str,
    seconds: float,
    where: Optional[str] = None,
    error: Type[EdgerunError] = BadInput,
) -> EdgerunError:
    """The error for a call of a runtime that exceeds its time."""
    return error(
        f"the model was not {doing} within {seconds:g} s",
        where=where,
        remedy="give smaller inputs, or a smaller model; or allow more with the environment "
        f"variable {CALL}",
    )


@contextmanager
def time_limit(doing: str, where: str) -> Iterator[None]:
    """End the process with an error when the body takes more than :func:`call_seconds`.

    From another thread, as code of a runtime cannot be interrupted.

    Args:
        doing: "opened" or "run once", for the error.
        where: the model.

    Raises:
        BadInput: as :func:`call_seconds`.
    """
    seconds = call_seconds()
    overdue = threading.Timer(seconds, lambda: os._exit(too_slow(doing, seconds, where).report()))
    overdue.daemon = True
    overdue.start()
    try:
        yield
    finally:
        overdue.cancel()
