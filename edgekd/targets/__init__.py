"""Where a model is run and measured: this machine now, a board over SSH in a later version."""

from edgekd.targets.local import LocalTarget
from edgekd.targets.target import Target, open_target

__all__ = ["LocalTarget", "Target", "open_target"]
