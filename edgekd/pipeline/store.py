"""The store: one folder per artifact, found by fingerprint, complete or absent.

A stage writes into a temporary folder next to its final path; the rename at the end is the
only moment at which the artifact appears, so after a kill there is the old state or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgekd.errors import InputError
from edgekd.files import file_sha256, json_sha256, write_errors

_RECORD = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, and what it was made from."""

    stage: str
    fingerprint: str
    folder: Path
    digest: str
    """The hash of its files' contents: what later stages depend on."""
    made_from: Mapping[str, Any]


def digest_of(folder: Path) -> str:
    """The digest of the artifact in a folder, as it was recorded when the stage was done."""
    record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    return str(record["digest"])


class Store:
    """The artifacts of one run folder. Only one process may write to it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self._lock = FileLock(folder / ".lock")
        self._owner_file = folder / ".owner"

    def acquire(self) -> None:
        """Create the folder and acquire its lock.

        Raises:
            InputError: the folder cannot be written, or another run holds it.
        """
        try:
            self.artifacts.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            owner = self._owner()
            raise InputError(
                f"another run{owner} is using this folder",
                where=str(self.folder),
                remedy="wait until it ends, or give this run its own folder with --output",
            ) from error
        except OSError:
            remedy = "give a folder that you may write to with --output"
            with write_errors(self.folder, "the run folder", remedy, InputError):
                raise
        with suppress(OSError):  # The name of the owner is only for the other run's message.
            self._owner_file.write_text(str(os.getpid()), encoding="utf-8")
        for leftover in self._unfinished():
            shutil.rmtree(leftover, ignore_errors=True)

    def release(self) -> None:
        """Release the lock."""
        with suppress(OSError):
            self._owner_file.unlink(missing_ok=True)
        self._lock.release()

    def has_leftovers(self) -> bool:
        """Whether there is what a killed run left, or a run in progress has."""
        return self._owner_file.exists() or any(self._unfinished())

    def _unfinished(self) -> Iterator[Path]:
        return self.artifacts.glob("*/.tmp-*")

    def _owner(self) -> str:
        try:
            return f" (process {self._owner_file.read_text(encoding='utf-8')})"
        except OSError:
            return ""

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The artifact of this fingerprint, or None when there is none or it was damaged."""
        folder = self._place(stage, fingerprint)
        record = self._record(folder)
        if record is None or not _intact(folder, record["files"]):
            return None
        return Artifact(stage, fingerprint, folder, record["digest"], record["made_from"])

    def is_undamaged(self, artifact: Artifact) -> bool:
        """Whether the contents of all files are those that were written, read again for it."""
        record = self._record(artifact.folder)
        return record is not None and all(
            (artifact.folder / name).is_file()
            and file_sha256(artifact.folder / name) == entry["sha256"]
            for name, entry in record["files"].items()
        )

    def remove(self, artifact: Artifact) -> None:
        """Remove a damaged artifact, so that its stage is run again."""
        (artifact.folder / _RECORD).unlink(missing_ok=True)
        shutil.rmtree(artifact.folder, ignore_errors=True)

    def latest(self, stage: str) -> Mapping[str, Any] | None:
        """What the newest artifact of a stage was made from, to explain why the stage is run
        again.
        """
        records = [
            (file.stat().st_mtime_ns, file)
            for file in (self.artifacts / stage).glob(f"[0-9a-f]*/{_RECORD}")
        ]
        if not records:
            return None
        record = self._record(max(records)[1].parent)
        return record["made_from"] if record else None

    def begin(self, stage: str, fingerprint: str) -> Path:
        """An empty temporary folder for a stage to write into."""
        self.discard(stage, fingerprint)
        temporary = self._temporary(stage, fingerprint)
        temporary.mkdir(parents=True)
        return temporary

    def discard(self, stage: str, fingerprint: str) -> None:
        """Remove what a stage wrote before it failed."""
        shutil.rmtree(self._temporary(stage, fingerprint), ignore_errors=True)

    def _temporary(self, stage: str, fingerprint: str) -> Path:
        return self.artifacts / stage / f".tmp-{fingerprint[:16]}"

    def commit(
        self, stage: str, fingerprint: str, temporary: Path, made_from: Mapping[str, Any]
    ) -> Artifact:
        """Turn a stage's temporary folder into its artifact, in one rename."""
        files = {
            str(file.relative_to(temporary)): _stamp(file) | {"sha256": file_sha256(file)}
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        digest = json_sha256({name: entry["sha256"] for name, entry in files.items()})
        record = {
            "schema": "edgekd.artifact/1",
            "stage": stage,
            "fingerprint": fingerprint,
            "digest": digest,
            "files": files,
            "made_from": made_from,
        }
        record = json.loads(json.dumps(record, default=str))  # as it will be read
        record["record_sha256"] = json_sha256(record)
        # Not atomic by itself: the artifact appears with the rename of its folder.
        text = json.dumps(record, indent=1, default=str)
        (temporary / _RECORD).write_text(text, encoding="utf-8")
        final = self._place(stage, fingerprint)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        return Artifact(stage, fingerprint, final, digest, made_from)

    def scratch(self, stage: str, fingerprint: str) -> Path:
        """A folder that survives a kill, for a stage's checkpoints."""
        folder = self.folder / "scratch" / f"{stage}-{fingerprint[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def link(self, name: str, artifact: Artifact) -> Path:
        """Point ``<run folder>/<name>`` at an artifact, so that its path is easy to remember.

        Raises:
            InputError: there is a folder, as in a copy of a run folder that followed the links.
        """
        link = self._link(name)
        temporary = self.folder / f".{name}.link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(artifact.folder.relative_to(self.folder), target_is_directory=True)
        temporary.replace(link)
        return link

    def is_linked(self, name: str, artifact: Artifact) -> bool:
        """Whether the link of :meth:`link` is there and points at this artifact."""
        link = self.folder / name
        return link.is_symlink() and link.readlink() == artifact.folder.relative_to(self.folder)

    def unlink(self, name: str) -> None:
        """Remove a link of :meth:`link`, so that it does not show an outdated artifact."""
        self._link(name).unlink(missing_ok=True)

    def _link(self, name: str) -> Path:
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            raise InputError(
                "this is a folder, and a run has a link to the stage's artifact here",
                where=str(path),
                remedy="remove it; copy run folders with their links (cp -a)",
            )
        return path

    def _place(self, stage: str, fingerprint: str) -> Path:
        return self.artifacts / stage / fingerprint[:16]

    @staticmethod
    def _record(folder: Path) -> dict[str, Any] | None:
        """The record of an artifact; None where there is none, or it is not as it was written."""
        try:
            record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            written = record.pop("record_sha256")
        except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError, KeyError):
            return None
        return record if written == json_sha256(record) else None


def _stamp(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _intact(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every file is unchanged; contents are read only where a stamp differs."""
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            return False
        stamp = _stamp(file)
        if stamp["bytes"] != entry["bytes"]:
            return False
        if stamp["modified_ns"] != entry["modified_ns"] and file_sha256(file) != entry["sha256"]:
            return False
    return True
