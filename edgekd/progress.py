"""Progress of training and stages: on the console and as a log of events.

On a terminal: progress bars with rate and time left. Elsewhere: plain lines, not too many.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)
from rich.segment import Segment

from edgekd.errors import printable


class Console(RichConsole):
    """A terminal that names from data cannot control: their control characters are escaped."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """The segments of something to print, as :meth:`rich.console.Console.render`."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


class Progress(Protocol):
    """A progress display: bars on a terminal, lines in a log, or nothing."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Start ``total`` units of work."""
        ...

    def advance(self, n: int = 1, **figures: float) -> None:
        """Advance by ``n`` units; ``figures`` are the latest values to show."""
        ...

    def message(self, text: str) -> None:
        """Show a message."""
        ...

    def finish(self) -> None:
        """End the work, successful or not."""
        ...


class Silent:
    """A progress display that shows nothing."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


_SECONDS_BETWEEN_LINES = 10.0


class EventLog:
    """One JSON object a line: ``{"time": …, "event": …, …}``. Append-only, flushed each time."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[str] = path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        self._stream.write(json.dumps(entry, default=str) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class ConsoleProgress:
    """The progress shown by the command line; a context manager that restores the terminal."""

    def __init__(
        self, console: RichConsole, log: EventLog | None = None, quiet: bool = False
    ) -> None:
        self._console = console
        self._log = log
        self._quiet = quiet
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._label, self._unit, self._total, self._done = "", "", 0, 0
        self._started = self._last_line = 0.0

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal and not self._quiet:
            self._bars = RichProgress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def start(self, label: str, total: int, unit: str) -> None:
        """Start ``total`` units of work."""
        self._label, self._unit, self._total, self._done = label, unit, total, 0
        self._started = self._last_line = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(escape(label), total=total, rate="", figures="")

    def advance(self, n: int = 1, **figures: float) -> None:
        """Advance by ``n`` units; ``figures`` are the latest values to show."""
        self._done += n
        now = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._log is not None and figures:
            self._log.write("progress", label=self._label, done=self._done, **figures)
        if self._bars is not None and self._task is not None:
            self._bars.update(
                self._task, advance=n, rate=f"{rate:,.3g} {self._unit}/s", figures=shown
            )
        elif not self._quiet and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self._total - self._done) / rate
            self._console.print(
                f"  {self._label}: {self._done}/{self._total} {self._unit}, "
                f"{rate:,.3g}/s, {left:.0f} s left  {shown}",
                highlight=False,
                markup=False,
            )

    def message(self, text: str) -> None:
        """Show a message."""
        if self._log is not None:
            self._log.write("message", text=text)
        if not self._quiet:
            self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def finish(self) -> None:
        """End the work, successful or not."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
