"""How many processes this run is of; told without torch, so that a plain run stays plain."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many processes ``torchrun``, or a launcher that sets the same variables, started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
