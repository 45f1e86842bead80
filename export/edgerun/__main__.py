"""``python -m edgerun`` runs :mod:`edgerun.cli`."""

from __future__ import annotations

import sys

from edgerun.cli import main
from edgerun.system import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
