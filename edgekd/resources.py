"""The profiles, pipelines and device-side code that the package ships.

An installed wheel carries profiles and pipelines inside the package; a source checkout has them at
its top. The device-side package ``edgerun`` is installed beside ``edgekd``.
"""

from __future__ import annotations

from pathlib import Path

import edgerun

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str, in_checkout: str) -> Path:
    inside = _PACKAGE / "shipped" / name
    return inside if inside.is_dir() else _PACKAGE.parent / in_checkout


def profiles_folder() -> Path:
    """The folder of the shipped device profiles."""
    return _shipped("profiles", "profiles")


def pipelines_folder() -> Path:
    """The folder of the shipped pipelines."""
    return _shipped("pipelines", "pipelines")


def edgerun_folder() -> Path:
    """The device-side package ``edgerun``, to be copied to or started on a device."""
    return Path(edgerun.__file__).resolve().parent
