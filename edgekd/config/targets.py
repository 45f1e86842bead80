"""The machines to measure on: ``ssh://…``, or names in the user's file of targets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import yaml
from pydantic import Field

from edgekd.config.base import ConfigModel, PositiveFloat
from edgekd.config.loader import load_section
from edgekd.config.yaml_source import read_yaml
from edgekd.errors import InputError, StageError, unknown_name
from edgekd.files import write_whole

SSH = "ssh://"
FILE = "EDGEKD_TARGETS"
"""Environment variable: the file of targets, instead of ``~/.config/edgekd/targets.yaml``."""

# Neither may begin with a hyphen, as an option does.
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9_:\[][A-Za-z0-9_.:%\[\]-]*$", max_length=255)]
User = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.][A-Za-z0-9_.@+-]*$", max_length=64)]
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
_RESERVED = ("local",)


class TargetConfig(ConfigModel):
    """A machine that is reached by SSH. What is left out is OpenSSH's own (``~/.ssh/config``)."""

    host: Host
    """Its name or address, or a ``Host`` of the SSH configuration."""
    user: User | None = None
    """The user there."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """The port of its SSH server."""
    key: str | None = None
    """File of the private key; it is given to ``ssh`` and never copied."""
    known_hosts: str | None = None
    """File of the known host keys."""
    ssh_config: str | None = None
    """A configuration file of OpenSSH instead of ``~/.ssh/config``: jump hosts, proxies."""
    python: str | None = None
    """Python there, 3.8 or later; ``~/`` is the home folder. Left out: that of ``edgekd target
    bootstrap``, else ``python3``."""
    folder: str = "~/.cache/edgerun"
    """Working folder there."""
    power_mode: str | None = None
    """Power mode (``nvpmodel -q``) or CPU governor that the machine must have when it measures."""
    lock: Annotated[str, Field(pattern="^/")] = "/tmp/edgekd-lease.lock"
    """File there that is locked while a model runs, the same for all users."""
    wait_seconds: Annotated[float, Field(ge=0)] = 600
    """How long to wait while another one uses the machine."""
    limit_seconds: PositiveFloat = 3600
    """Longest time that one command may run there."""
    grace_seconds: Annotated[float, Field(ge=1)] = 120
    """How long a command goes on there when the connection is lost, before it is ended there;
    the connection is retried for as long."""
    cache_mb: Annotated[float, Field(ge=0)] = 2000
    """Size of the files stored there, in MB; those used longest ago are removed above it."""

    @property
    def address(self) -> str:
        """``user@host:port``, as far as it is known."""
        user = f"{self.user}@" if self.user else ""
        return f"{user}{self.host}" + (f":{self.port}" if self.port else "")


def targets_file() -> Path:
    """The user's file of targets."""
    if os.environ.get(FILE):
        return Path(os.environ[FILE])
    base = os.environ.get("XDG_CONFIG_HOME")
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".config"
    return folder / "edgekd" / "targets.yaml"


def load_targets() -> dict[str, TargetConfig]:
    """The targets of the user's file by name; none where there is no file.

    Raises:
        InputError: something in it is wrong.
    """
    path = targets_file()
    if not path.exists():
        return {}
    names = read_yaml(path).content if path.stat().st_size else {}
    for name in names:
        check_name(str(name), str(path))
    return {str(name): load_section(path, TargetConfig, str(name)) for name in names}


def find_target(name: str, where: str | None = "target") -> TargetConfig:
    """The settings of a target: ``ssh://[user@]host[:port]``, or a name in the user's file.

    Raises:
        InputError: it is neither.
    """
    if name.startswith(SSH):
        return _parse_url(name, where)
    known = load_targets()
    if name not in known:
        raise unknown_name("target", name, ["local", *known], where)
    return known[name]


def _parse_url(url: str, where: str | None) -> TargetConfig:
    wrong = None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        wrong = str(error)
    else:
        if parts.password is not None:
            wrong = "a password is not taken: use a key"
        elif parts.path.strip("/") or parts.query or parts.fragment:
            wrong = f"there is something after the host: {url[len(SSH) + len(parts.netloc) :]!r}"
        elif not parts.hostname:
            wrong = "it has no host"
        elif port == 0:
            wrong = "0 is no port"
    remedy = "write ssh://user@host or ssh://user@host:port; or name it: edgekd target add"
    if wrong is None:
        given = {"host": parts.hostname, "user": parts.username, "port": port}
        try:
            return TargetConfig.model_validate(given)
        except ValueError:
            wrong = "the host or the user has a character that no such name has"
    raise InputError(f"{url!r} is no target: {wrong}", where=where, remedy=remedy)


def check_name(name: str, where: str) -> None:
    """Check that a target can have this name.

    Raises:
        InputError: it cannot.
    """
    if not _NAME.match(name) or name in _RESERVED:
        raise InputError(
            f"{name!r} cannot be the name of a target",
            where=where,
            remedy="use letters, digits, '.', '_' and '-'; 'local' is this machine",
        )


def add_target(name: str, settings: Mapping[str, object]) -> Path:
    """Append a target to the user's file, which is made if there is none; its path.

    Raises:
        InputError: there is one of this name, or a setting is wrong.
        StageError: the file cannot be written.
    """
    path = targets_file()
    check_name(name, "edgekd target add")
    if name in load_targets():
        raise InputError(
            f"there is a target {name!r} already",
            where=str(path),
            remedy=f"edit the file, or first: edgekd target remove {name}",
        )
    try:
        TargetConfig.model_validate(settings)
    except ValueError as error:
        problem = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        raise InputError(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            where="edgekd target add",
            remedy="see edgekd target add --help",
        ) from error
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    added = yaml.safe_dump({name: dict(settings)}, sort_keys=False, allow_unicode=True)
    _write_file(path, before + added)
    return path


def remove_target(name: str) -> Path:
    """Remove a target from the user's file, leaving all other lines as they are; the file's path.

    Raises:
        InputError: there is none of this name.
        StageError: the file cannot be written.
    """
    path = targets_file()
    known = load_targets()
    if name not in known:
        raise unknown_name("target", name, known, where=str(path))
    text = path.read_text(encoding="utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    begin, end = next(
        (key.start_mark.index, value.end_mark.index)
        for key, value in node.value
        if key.value == name
    )
    _write_file(path, text[:begin] + text[end:].lstrip("\n") or "{}\n")
    return path


def _write_file(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(
            f"the folder of the file of targets cannot be made: {error.strerror}",
            where=str(path.parent),
            remedy=f"name another file in the environment variable {FILE}",
        ) from error
    write_whole(path, text, "the file of targets", f"name another one in {FILE}")
