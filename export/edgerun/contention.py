"""Other work on the processors while something is measured, from the kernel's counters.

A figure of a busy machine is a figure of that load. It is detected by what other processes used of
the processors (``/proc/stat`` less this process's own time), by time stolen by the hypervisor, by
the time that threads of this process were ready and waited for a processor (``schedstat``), and
recorded with involuntary context switches, pressure (PSI) and clocks. Counters that the system
does not have are None, never zero.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

ROOT = Path("/")
OTHERS = 0.10
"""Share of the usable processors' time that others may use: background services take less than
0.03, and one busy loop beside the model takes 0.5 of two processors."""
STOLEN = 0.02
WAITED = 0.02
"""Share of its own time that the process may wait for a processor: below 0.005 on an idle
machine."""


@dataclass(frozen=True)
class Counters:
    """The counters at one moment; times in seconds, summed over the usable processors."""

    time: float
    cpus: Optional[int]
    busy: Optional[float]
    stolen: Optional[float]
    own: Optional[float]
    ran: Optional[float]
    waited: Optional[float]
    preempted: Optional[int]
    pressure: Optional[float]


def read_counters(root: Path = ROOT) -> Counters:
    """Read them now, in well under a millisecond."""
    usage = None if resource is None else resource.getrusage(resource.RUSAGE_SELF)
    cpus, busy, stolen = _processors(root)
    ran, waited = _scheduled(root)
    return Counters(
        time=time.perf_counter(),
        cpus=cpus,
        busy=busy,
        stolen=stolen,
        own=None if usage is None else usage.ru_utime + usage.ru_stime,
        ran=ran,
        waited=waited,
        preempted=None if usage is None else usage.ru_nivcsw,
        pressure=_pressure(root),
    )


@dataclass(frozen=True)
class Contention:
    """What was used and waited for between two moments.

    Attributes:
        seconds: between them.
        cpus: processors that this process may use.
        others: share of their time that other processes used.
        stolen: share of their time that the hypervisor gave to others.
        waited: share of the time in which this process ran or was ready that it waited.
        preempted_per_s: involuntary context switches in a second.
        pressure: share of the time in which some process waited for a processor (PSI).
    """

    seconds: float
    cpus: Optional[int] = None
    others: Optional[float] = None
    stolen: Optional[float] = None
    waited: Optional[float] = None
    preempted_per_s: Optional[float] = None
    pressure: Optional[float] = None

    def to_json(self) -> Dict[str, Any]:
        """A plain mapping."""
        return {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def between(cls, before: Counters, after: Counters) -> Contention:
        """The shares of the time between two readings."""

        def grown(name: str) -> Optional[float]:
            first, last = getattr(before, name), getattr(after, name)
            return None if first is None or last is None else max(0.0, float(last - first))

        def share(part: Optional[float], whole: Optional[float]) -> Optional[float]:
            return None if part is None or not whole else min(1.0, part / whole)

        seconds = max(after.time - before.time, 1e-9)
        whole = None if after.cpus is None else seconds * after.cpus
        busy, own, ran, waited = (grown(name) for name in ("busy", "own", "ran", "waited"))
        others = None if busy is None or own is None else max(0.0, busy - own)
        wanted = None if ran is None or waited is None else ran + waited
        preempted = grown("preempted")
        return cls(
            seconds=seconds,
            cpus=after.cpus,
            others=share(others, whole),
            stolen=share(grown("stolen"), whole),
            waited=share(waited, wanted),
            preempted_per_s=None if preempted is None else preempted / seconds,
            pressure=share(grown("pressure"), seconds),
        )

    @classmethod
    def mean(cls, parts: Sequence[Contention]) -> Contention:
        """The mean of several spans, weighted by their length."""
        total = sum(part.seconds for part in parts)

        def weighted(name: str) -> Optional[float]:
            known: List[tuple[float, float]] = [
                (part.seconds, getattr(part, name))
                for part in parts
                if getattr(part, name) is not None
            ]
            length = sum(seconds for seconds, _ in known)
            return sum(seconds * value for seconds, value in known) / length if known else None

        names = ("others", "stolen", "waited", "preempted_per_s", "pressure")
        return cls(total, parts[-1].cpus, **{name: weighted(name) for name in names})

    @property
    def reason(self) -> str:
        """Why the machine is called busy; empty where it is not."""
        parts = list(self._parts())
        return f"the machine is busy: {' and '.join(parts)}" if parts else ""

    def _parts(self) -> Iterator[str]:
        if self.others is not None and self.others > OTHERS:
            which = "its processor" if self.cpus == 1 else f"its {self.cpus} processors"
            yield f"other processes used {100 * self.others:.0f} % of the CPU time of {which}"
        if self.stolen is not None and self.stolen > STOLEN:
            yield f"the hypervisor took {100 * self.stolen:.0f} % of the CPU time"
        if self.waited is not None and self.waited > WAITED:
            yield f"the model waited for a processor {100 * self.waited:.0f} % of its time"


def _processors(root: Path) -> tuple[Optional[int], Optional[float], Optional[float]]:
    """Number of usable processors, and the seconds that they were busy and stolen in all."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    count, busy, stolen = 0, 0, 0
    for line in _text(root / "proc/stat").splitlines():
        name, *fields = line.split()
        number = name[3:]
        if not name.startswith("cpu") or not number.isdigit() or len(fields) < 8:
            continue
        if usable is not None and root == ROOT and int(number) not in usable:
            continue
        user, nice, system, _, _, irq, soft_irq, steal = map(int, fields[:8])
        count, busy = count + 1, busy + user + nice + system + irq + soft_irq
        stolen += steal
    if not count:
        return None, None, None
    ticks = os.sysconf("SC_CLK_TCK")
    return count, busy / ticks, stolen / ticks


def _scheduled(root: Path) -> tuple[Optional[float], Optional[float]]:
    """Seconds that this process's threads ran, and that they were ready and waited."""
    ran, waited, found = 0, 0, False
    for path in (root / "proc/self/task").glob("*/schedstat"):
        fields = _text(path).split()
        if len(fields) >= 2:
            ran, waited, found = ran + int(fields[0]), waited + int(fields[1]), True
    return (ran / 1e9, waited / 1e9) if found else (None, None)


def _pressure(root: Path) -> Optional[float]:
    for line in _text(root / "proc/pressure/cpu").splitlines():
        if line.startswith("some ") and "total=" in line:
            return int(line.rpartition("total=")[2]) / 1e6
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
