"""``python -m edgerun`` runs :mod:`edgerun.cli`."""

from __future__ import annotations

import sys

from edgerun.cli import main
from edgerun.process import supervised

if __name__ == "__main__":
    sys.exit(supervised(main))
