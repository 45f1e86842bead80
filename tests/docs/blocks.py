"""The code blocks of the Markdown pages, with the comment above each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
)
_BLOCK = re.compile(r"(?:<!-- *([^\n]*?) *-->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w.-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text and line, and the words of the comment right above it.

    ``<!-- not run: reason -->`` and ``<!-- not a pipeline: reason -->`` leave it out;
    ``<!-- run with: key=value … -->`` adds ``--set`` to each ``edgekd run`` in it.
    """

    page: Path
    line: int
    kind: str
    text: str
    mark: str

    @property
    def left_out(self) -> bool:
        """Whether the page states why it is not checked."""
        return self.mark.startswith("not ")

    @property
    def file(self) -> str | None:
        """The name of the file that it stands for, in its first line: ``# mine.py``."""
        found = _FILE.match(self.text)
        return found[1] if found else None


def blocks(kind: str, page: Path | None = None) -> Iterator[Block]:
    """The blocks of a language, in the order of the pages."""
    for path in [page] if page else PAGES:
        text = (ROOT / path).read_text(encoding="utf-8")
        for found in _BLOCK.finditer(text):
            if found[2] == kind:
                line = text.count("\n", 0, found.start(2)) + 1
                yield Block(path, line, kind, found[3], found[1] or "")
