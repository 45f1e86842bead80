"""Install a runtime on a device: a virtual environment in the working folder there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from edgekd.errors import InputError, StageError, TargetError
from edgekd.targets.remote import Job, RemoteMachine

PACKAGES = ("numpy", "onnxruntime")
OLDEST_GLIBC, OLDEST_TAGS = 17, ("manylinux2014", "manylinux2010", "manylinux1")
_MACHINES = {"armv8l": "armv7l", "arm64": "aarch64", "amd64": "x86_64"}

_MAKE = (
    "import sys, venv; venv.create(sys.argv[1], with_pip=False, symlinks=True, "
    "system_site_packages=sys.argv[2] == 'system')"
)


def bootstrap(
    target: RemoteMachine,
    packages: Sequence[str] = PACKAGES,
    wheels: Path | None = None,
    offline: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Make a virtual environment there, which the target then uses, and install packages.

    pip itself is carried over as a wheel, so that the device needs neither pip nor ensurepip.

    Args:
        target: the device.
        packages: what pip installs there.
        wheels: a folder of wheels that are carried over; the device then needs no network.
        offline: download the wheels here and carry them over.
        say: called with each step.

    Returns:
        The Python there, and its versions of the packages.

    Raises:
        InputError: the folder has no wheels.
        StageError: there is no wheel of a package for the device, or none of pip here.
        TargetError: the device cannot be reached, or something fails there.
    """
    hello = target.hello()
    folder = f"{hello['folder']}/venv"
    # TensorRT's Python module is the system's on a Jetson.
    kind = "system" if "tensorrt" in hello["modules"] else "own"
    say(f"{folder}: a virtual environment of {hello['python']} ({hello['version']})")
    _run(target, Job(["{python}", "-c", _MAKE, folder, kind], "target bootstrap"))
    with tempfile.TemporaryDirectory(prefix="edgekd-") as temporary:
        pip = _pip_wheel(Path(temporary))
        if offline:
            wheels = Path(temporary) / "wheels"
            say(f"wheels of {', '.join(packages)} for {hello['machine']} are downloaded here")
            _download(wheels, packages, hello["machine"], hello["libc"], hello["version"])
        sent = {f"work/{pip.name}": pip}
        options = ["--disable-pip-version-check", "--no-input", "--quiet", "--upgrade"]
        if wheels is not None:
            found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
            if not found:
                raise InputError(
                    "there is no wheel in the folder",
                    where=str(wheels),
                    remedy=f"pip download --only-binary=:all: -d {wheels} {' '.join(packages)}",
                )
            sent |= {f"work/wheels/{wheel.name}": wheel for wheel in found}
            options += ["--no-index", "--find-links", "wheels"]
        say(f"installing {', '.join(packages)} there")
        words = [f"{folder}/bin/python", f"{pip.name}/pip", "install", *options, *packages]
        offer = "" if wheels else "; without a network there: --offline, or --wheels FOLDER"
        _run(target, Job(words, "target bootstrap", sent=sent), offer)
    target.close()  # The next connection starts the new Python.
    board = target.board()
    lacking = [name for name in PACKAGES if board[name] is None]
    if lacking:
        raise TargetError(
            f"after the installation {board['python']} has no {' and no '.join(lacking)}",
            where=target.name,
            remedy="leave out python in the file of targets, so that the new one is used"
            if target.config.python
            else "see what pip says there",
        )
    return {name: str(board[name]) for name in ("python", *PACKAGES)}


def _run(target: RemoteMachine, job: Job, offer: str = "") -> None:
    done = target.run_job(job)
    if done.returncode != 0:
        last = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise TargetError(
            f"{job.words[0]} ended with code {done.returncode} there:\n{last}",
            where=target.name,
            remedy=f"fix what it says{offer}",
        )


def _pip_wheel(folder: Path) -> Path:
    """The wheel of pip that this Python has for new environments, else a downloaded one."""
    places = [Path("/usr/share/python-wheels")]
    ensurepip = importlib.util.find_spec("ensurepip")
    if ensurepip is not None and ensurepip.origin is not None:
        places.append(Path(ensurepip.origin).parent / "_bundled")
    found = [wheel for place in places for wheel in sorted(place.glob("pip-*.whl"))]
    if not found:
        _pip_download(folder, ["--no-deps", "pip"])
        found = sorted(folder.glob("pip-*.whl"))
    return found[-1]


def platform_tags(machine: str, libc: str) -> list[str]:
    """The wheel platforms of a Linux machine, the newest first.

    Args:
        machine: as ``platform.machine()`` there.
        libc: name and version, such as ``glibc-2.31``.

    Raises:
        StageError: it has no glibc, for which ONNX Runtime has wheels.
    """
    name = _MACHINES.get(machine, machine)
    found = re.fullmatch(r"glibc-2\.(\d+).*", libc)
    if found is None:
        raise StageError(
            f"there are no wheels of ONNX Runtime for {libc or 'an unknown C library'}",
            where=machine,
            remedy="use a system with glibc, or build ONNX Runtime and give --wheels",
        )
    newest = int(found.group(1))
    tags = [f"manylinux_2_{minor}_{name}" for minor in range(newest, OLDEST_GLIBC - 1, -1)]
    return [*tags, *(f"{tag}_{name}" for tag in OLDEST_TAGS), f"linux_{name}"]


def _download(folder: Path, packages: Sequence[str], machine: str, libc: str, python: str) -> None:
    tags = [word for tag in platform_tags(machine, libc) for word in ("--platform", tag)]
    version = ".".join(python.split(".")[:2])
    _pip_download(folder, ["--only-binary=:all:", *tags, "--python-version", version, *packages])


def _pip_download(folder: Path, words: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--dest", str(folder), *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise StageError(
            f"pip could not download the wheels: {last}",
            where=" ".join(words[-2:]),
            remedy="check this machine's network, or give --wheels FOLDER",
        )
