"""Where a model is run and measured: this machine, or one that is reached by SSH."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from edgekd.config.targets import SSH, TargetConfig, find_target, load_targets
from edgekd.errors import EdgekdError, InputError
from edgekd.extension import check_arguments, resolve
from edgekd.targets.local import LocalTarget
from edgekd.targets.ssh import SshTarget
from edgekd.targets.target import Target

__all__ = ["LocalTarget", "SshTarget", "Target", "machine_of", "open_target"]

TARGETS: Mapping[str, Callable[[], Target]] = {LocalTarget.name: LocalTarget}
"""The built-in targets by the names they have in a pipeline."""

_MEMBERS = ("name", "bench", "run", "probe", "build", "parse", "info")


def open_target(name: str, where: str | None = "target") -> Target:
    """The target that a pipeline or an option names.

    Args:
        name: ``local``; ``ssh://[user@]host[:port]`` or a name in the user's file of targets; or
            an entry point of ``edgekd.targets``, or ``package.module:name``, of a
            :class:`Target` or of a class or function that gives one without arguments.
        where: the YAML key, for errors.

    Raises:
        InputError: an unknown name, or what is no target.
    """
    named = {} if name in TARGETS or name.startswith(SSH) or ":" in name else load_targets()
    if name.startswith(SSH) or name in named:
        return _ssh_target(name, find_target(name, where))
    known = {**TARGETS, **dict.fromkeys(named, LocalTarget)}
    found = resolve(name, known, "target", where, group="edgekd.targets")
    target: Target = _made(found, name, where) if callable(found) else found
    lacking = [member for member in _MEMBERS if not hasattr(target, member)]
    if lacking:
        raise InputError(
            f"{name!r} is not a target: it has no {', '.join(lacking)}",
            where=where,
            remedy="give it what edgekd.targets.Target describes",
        )
    return target


def _made(maker: Callable[[], Target], name: str, where: str | None) -> Target:
    check_arguments(maker, {}, name=f"target {name!r}", where=where)
    try:
        return maker()
    except EdgekdError:
        raise
    except Exception as error:
        raise InputError(
            f"target {name!r} fails when made: {type(error).__name__}: {error}",
            where=where,
            remedy="call it in python alone to see the whole traceback",
        ) from error


@lru_cache
def _ssh_target(name: str, config: TargetConfig) -> SshTarget:
    """One object, and so one connection, for all that is done with a target."""
    return SshTarget(name, config)


def machine_of(name: str) -> list[Any]:
    """What the machine of a target is, for a fingerprint: a figure is valid for it alone.

    Raises:
        TargetError: it cannot be reached.
        InputError: as :func:`open_target`.
    """
    target = None if name == LocalTarget.name else open_target(name)
    if isinstance(target, SshTarget):
        return target.identity()
    return [platform.node(), platform.machine()]
