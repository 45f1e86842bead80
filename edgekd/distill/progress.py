"""What a long piece of work tells whoever watches it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A progress display: bars on a terminal, lines in a log, or nothing."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin ``total`` units of work."""
        ...

    def advance(self, n: int = 1, **figures: float) -> None:
        """``n`` units are done; ``figures`` are the latest values to show."""
        ...

    def message(self, text: str) -> None:
        """Something a person should know."""
        ...

    def finish(self) -> None:
        """The work has ended, well or not."""
        ...
