"""What installed distributions add: the entry points of the groups ``edgekd.losses`` and the like.

A distribution's ``pyproject.toml`` has a table such as ``[project.entry-points."edgekd.losses"]``
with lines ``name = "package.module:function"``. The name then works in a pipeline wherever a
built-in one does. A built-in name always means the built-in thing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from edgekd.errors import InputError

GROUPS = (
    "edgekd.engines",
    "edgekd.losses",
    "edgekd.models",
    "edgekd.schemes",
    "edgekd.sources",
    "edgekd.targets",
    "edgekd.tasks",
)


@dataclass(frozen=True)
class InstalledExtension:
    """One entry point.

    Attributes:
        name: what a pipeline names it by.
        reference: the ``package.module:name`` it stands for, as the distribution gives it.
        distribution: the name of the distribution, as pip knows it.
        version: that distribution's version.
    """

    name: str
    reference: str
    distribution: str
    version: str


def installed_extensions(group: str) -> Mapping[str, tuple[InstalledExtension, ...]]:
    """The entry points of a group by name; those of one name are of different distributions."""
    return _read(_search_path())[group]


def find_extension(
    name: str, group: str, kind: str, where: str | None = None
) -> InstalledExtension | None:
    """The entry point of that name; None when no installed distribution has one.

    Args:
        name: what the pipeline names.
        group: one of :data:`GROUPS`.
        kind: what is looked for, for the error ("loss", "model").
        where: the YAML key, for the error.

    Raises:
        InputError: two distributions have one of this name.
    """
    found = installed_extensions(group).get(name, ())
    if len(found) > 1:
        owners = " and ".join(f"{each.distribution} {each.version}" for each in found)
        raise InputError(
            f"the {kind} {name!r} is an entry point of {owners}",
            where=where,
            remedy=f"uninstall all but one, or write the one that is meant: "
            f"{' or '.join(repr(each.reference) for each in found)}",
        )
    return found[0] if found else None


def extensions_named(name: str) -> tuple[InstalledExtension, ...]:
    """The entry points of that name in all groups."""
    groups = _read(_search_path())
    return tuple(each for group in GROUPS for each in groups[group].get(name, ()))


def _search_path() -> tuple[tuple[str, int], ...]:
    """Where distributions are looked for; an installation changes a folder's time of change."""
    return tuple((entry, _changed(entry)) for entry in sys.path)


def _changed(entry: str) -> int:
    try:
        return os.stat(entry or os.curdir).st_mtime_ns  # noqa: PTH116 - sys.path holds texts
    except OSError:
        return 0


@lru_cache(maxsize=8)
def _read(
    search_path: tuple[tuple[str, int], ...],
) -> Mapping[str, Mapping[str, tuple[InstalledExtension, ...]]]:
    """All groups, read once per process as long as nothing is installed."""
    groups = {}
    for group in GROUPS:
        names: dict[str, dict[str, InstalledExtension]] = {}
        for point in importlib.metadata.entry_points(group=group):
            if point.dist is not None:
                reference = re.sub(r"\s|\[.*", "", point.value)  # "module : name [extra]"
                owner, version = str(point.dist.name), str(point.dist.version)
                made = InstalledExtension(point.name, reference, owner, version)
                names.setdefault(point.name, {})[owner] = made
        groups[group] = {name: tuple(owners.values()) for name, owners in names.items()}
    return groups
