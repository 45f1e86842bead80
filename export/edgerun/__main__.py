"""``python -m edgerun`` runs :mod:`edgerun.cli`."""

from __future__ import annotations

import sys

from edgerun.cli import main

if __name__ == "__main__":
    sys.exit(main())
