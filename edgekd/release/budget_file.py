"""A budget file: the keys of a pipeline's ``gate`` section, or a whole pipeline file."""

from __future__ import annotations

from pathlib import Path

from edgekd.config.budgets import GateConfig
from edgekd.config.loader import load_section
from edgekd.config.yaml_source import read_yaml


def load_budgets(path: Path) -> GateConfig:
    """Read the budgets of a file.

    A file with a ``gate`` key (a pipeline) gives that section; any other is the section itself.

    Raises:
        InputError: the file cannot be read or a key is wrong; the error names its line.
    """
    key = "gate" if "gate" in read_yaml(path).content else None
    return load_section(path, GateConfig, key)
