"""Candidates for the student; a network made smaller, and its structure built again."""

from edgekd.students.depth import drop_layers, repeated_blocks, skip_blocks
from edgekd.students.pruning import Pruned, Width, prune
from edgekd.students.pruning_plan import ChannelCut, apply_cuts, read_structure, write_structure

__all__ = [
    "ChannelCut",
    "Pruned",
    "Width",
    "apply_cuts",
    "drop_layers",
    "prune",
    "read_structure",
    "repeated_blocks",
    "skip_blocks",
    "write_structure",
]
