"""Where a model is run and measured: this machine now, a board over SSH in a later version."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgekd.errors import EdgekdError, InputError
from edgekd.extension import check_arguments, resolve
from edgekd.targets.local import LocalTarget
from edgekd.targets.target import Target

__all__ = ["LocalTarget", "Target", "open_target"]

TARGETS: Mapping[str, Callable[[], Target]] = {LocalTarget.name: LocalTarget}
"""The built-in targets by the names they have in a pipeline."""

_MEMBERS = ("name", "bench", "run", "probe", "build", "parse", "info")


def open_target(name: str, where: str | None = "target") -> Target:
    """The target that a pipeline or an option names.

    Args:
        name: ``local``; or an entry point of ``edgekd.targets``, or ``package.module:name``, of a
            :class:`Target` or of a class or function that gives one without arguments.
        where: the YAML key, for errors.

    Raises:
        InputError: an unknown name, what is no target, or ``ssh://…``, which this version does
            not have.
    """
    if name.startswith("ssh://"):
        raise InputError(
            f"target {name!r} is on another machine, which a later version will support",
            where=where,
            remedy="use 'local' here; on the device, unpack the bundle and run "
            "'python -m edgerun bench MODEL.onnx'",
        )
    found = resolve(name, TARGETS, "target", where, group="edgekd.targets")
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
