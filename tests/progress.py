"""A progress display for tests."""

from __future__ import annotations


class RecordedProgress:
    """Shows nothing and records what it is given."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.labels: list[str] = []
        self.units: set[str] = set()
        self.done = self.total = self.finished = 0

    @property
    def open(self) -> bool:
        """Whether something was started and is not finished."""
        return len(self.labels) > self.finished

    def start(self, label: str, total: int, unit: str) -> None:
        self.labels.append(label)
        self.units.add(unit)
        self.total += total

    def advance(self, n: int = 1, **figures: float) -> None:
        self.done += n

    def message(self, text: str) -> None:
        self.messages.append(text)

    def finish(self) -> None:
        self.finished += 1
