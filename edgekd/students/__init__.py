"""Candidates for the student: a network pruned, and its structure built again."""

from edgekd.students.pruning import Pruned, Width, prune
from edgekd.students.pruning_plan import ChannelCut, apply_cuts, read_cuts, write_cuts

__all__ = ["ChannelCut", "Pruned", "Width", "apply_cuts", "prune", "read_cuts", "write_cuts"]
