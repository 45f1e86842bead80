"""The timing cache: what earlier builds measured, so that a build need not time every kernel.

The file names the library, its version and the GPU: timings of another one would choose kernels
that are slow here. TensorRT for RTX chooses kernels on the device and has no use for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

from edgerun.errors import BadInput
from edgerun.output_file import write_whole
from edgerun.tensorrt_library import Library

MAGIC = b"edgerun.timing-cache/1 "


@dataclass
class TimingCache:
    """A cache attached to a builder's configuration.

    Attributes:
        path: its file.
        key: library, version and device of its timings.
        state: ``new``, ``reused`` or ``replaced``.
        reason: why an earlier one was replaced.
        bytes_before: size of the timings taken over.
    """

    path: Path
    key: Dict[str, str]
    state: str = "new"
    reason: str | None = None
    bytes_before: int = 0

    @classmethod
    def attach(cls, library: Library, config: Any, path: Path, device: str) -> TimingCache:
        """Read a cache's file, if it is of this library and device, into the configuration.

        Raises:
            BadInput: the file is something else, which saving would overwrite.
        """
        cache = cls(path, {"library": library.name, "version": library.version, "device": device})
        timings = cache._read()
        if timings and not config.set_timing_cache(config.create_timing_cache(timings), False):
            cache._replace(f"{library} refuses it")
            timings = b""
        if not timings:
            config.set_timing_cache(config.create_timing_cache(b""), False)
        cache.bytes_before = len(timings)
        return cache

    def save(self, config: Any) -> Dict[str, Any]:
        """Write what is known now, and describe it for the record.

        Raises:
            CannotWrite: the file cannot be written.
        """
        timings = bytes(memoryview(config.get_timing_cache().serialize()))
        header = {**self.key, "sha256": _digest(timings), "bytes": len(timings)}
        content = MAGIC + json.dumps(header).encode("utf-8") + b"\n" + timings
        write_whole(self.path, content)
        return {
            "file": str(self.path),
            "state": self.state,
            "reason": self.reason,
            "bytes_before": self.bytes_before,
            "bytes": len(timings),
        }

    def _read(self) -> bytes:
        if not self.path.exists():
            return b""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise BadInput(f"the timing cache cannot be read: {error}", str(self.path)) from error
        if not content.startswith(MAGIC) and content:
            raise BadInput(
                "this file is not a timing cache of edgerun, and would be overwritten",
                where=str(self.path),
                remedy="give --timing-cache another file",
            )
        head, _, timings = content[len(MAGIC) :].partition(b"\n")
        try:
            header = json.loads(head.decode("utf-8"))
            key = {name: str(header[name]) for name in self.key}
            whole = header["sha256"] == _digest(timings)
        except (ValueError, KeyError, TypeError):
            return self._replace("it is damaged")
        if not whole:
            return self._replace("it is damaged")
        if key != self.key:
            differences = [
                f"{key[n]}, not {self.key[n]}" for n in self.key if key[n] != self.key[n]
            ]
            return self._replace(f"its timings are of {'; '.join(differences)}")
        self.state = "reused"
        return timings

    def _replace(self, reason: str) -> bytes:
        self.state, self.reason = "replaced", reason
        return b""


def _digest(timings: bytes) -> str:
    return hashlib.sha256(timings).hexdigest()
