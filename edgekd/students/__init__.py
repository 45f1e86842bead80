"""Candidates for the student: a network pruned, and its structure built again."""

from edgekd.students.pruning import Pruned, Width, prune
from edgekd.students.structure import Cut, apply_cuts, read_cuts, write_cuts

__all__ = ["Cut", "Pruned", "Width", "apply_cuts", "prune", "read_cuts", "write_cuts"]
