"""The device's end of a connection: keeps files by their SHA-256 and runs jobs that outlive it.

The source of this file is sent over the connection and run there, before edgerun itself is: it
needs the standard library alone. Requests and answers are a line of JSON and ``size`` bytes that
follow it, on standard input and output, so that no file name passes through a shell.

A job is started by a supervisor, a process of its own session. It holds the device's lease while
it runs, ends the job at its time limit, or when nobody has asked for it for ``grace`` seconds,
and leaves the exit code in the job's folder, where a later connection finds it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Dict, List, Mapping, Optional, Tuple

try:
    import fcntl
except ImportError:  # Windows, which is no target
    fcntl = None  # type: ignore[assignment]

READY = "edgekd-device"
"""The first word of the line that this program prints when it is ready."""

BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RENEWED = 5.0
"""Seconds after which a lease is renewed; it counts as abandoned after six times as many."""
PARTIAL_DAYS = 7
TAIL = 20_000
"""Bytes of a job's output that are sent back."""


class Refused(Exception):
    """What cannot be done here: a kind for the program on the other end, and why."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind, self.what = kind, what


class Device:
    """The working folder and the requests: each method named ``do_…`` answers one."""

    folder: Path

    def do_hello(self, folder: str) -> Dict[str, Any]:
        """Make the working folder; what this device and its Python are."""
        self.folder = Path(os.path.expanduser(folder))  # noqa: PTH111 - "~" stays if unknown
        if not self.folder.is_absolute():
            self.folder = Path.home() / self.folder
        for name in ("cache", "jobs"):
            (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_left_jobs()
        model = _text("/proc/device-tree/model") or _text("/sys/class/dmi/id/product_name")
        identity = _text("/etc/machine-id") or _text("/var/lib/dbus/machine-id")
        return {
            "folder": str(self.folder),
            "python": sys.executable,
            "version": platform.python_version(),
            "machine": platform.machine(),
            "libc": "-".join(platform.libc_ver()),
            "host": platform.node(),
            "model": model,
            "identity": hashlib.sha256(identity.encode()).hexdigest()[:16] if identity else None,
            "modules": [n for n in ("numpy", "onnxruntime", "tensorrt") if _installed(n)],
        }

    def do_have(self, files: Mapping[str, int]) -> Dict[str, int]:
        """Of files by SHA-256 with their sizes: those that are not here, and how much of each."""
        missing = {}
        for digest, size in files.items():
            stored = self._stored(digest)
            if not stored.is_file() or stored.stat().st_size != size:
                partial = self._partial(digest)
                missing[digest] = partial.stat().st_size if partial.is_file() else 0
        return missing

    def do_put(self, digest: str, offset: int, total: int, content: bytes = b"") -> Dict[str, int]:
        """Append to a file that is sent; the offset that is expected next."""
        partial = self._partial(digest)
        try:
            with partial.open("ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                at = os.fstat(file.fileno()).st_size
                view = memoryview(content if at == offset else b"")
                while view:
                    written = file.write(view)
                    view = view[written:]
                    at += written
        except OSError as error:
            if error.errno in _FULL:  # other programs need the space
                with suppress(OSError):
                    partial.unlink()
            raise
        if at < total:
            return {"offset": at}
        with suppress(FileNotFoundError):  # finished meanwhile by another connection
            if _sha256(partial) != digest:
                partial.unlink()
                raise Refused("damaged", "a file arrived with another SHA-256")
            partial.chmod(0o400)
            partial.replace(self._stored(digest))
        return {"offset": total}

    def do_unpack(self, digest: str) -> str:
        """The folder to which the archive of edgerun is unpacked and compiled."""
        import compileall
        import zipfile

        folder = self.folder / "edgerun" / digest
        if not folder.is_dir():
            new = folder.with_name(f"{digest}.{os.getpid()}")
            with zipfile.ZipFile(str(self._stored(digest))) as archive:
                archive.extractall(str(new))
            compileall.compile_dir(str(new), quiet=2)
            with suppress(OSError):  # made meanwhile by another connection
                new.rename(folder)
            shutil.rmtree(str(new), ignore_errors=True)
            others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in others[:-4]:
                shutil.rmtree(str(old), ignore_errors=True)
        return str(folder)

    def do_board(self, edgerun: str) -> Dict[str, Any]:
        """What :func:`edgerun.board.describe_board` says."""
        sys.path.insert(0, edgerun)
        from edgerun.board import describe_board

        return describe_board(folder=self.folder)

    def do_start(self, job: str, **task: Any) -> None:
        """Start a job, unless it was started before: its files, then its supervisor.

        ``task``: ``words``, ``environment`` (in addition to this one without Python's variables),
        ``files`` (place in the job's folder, SHA-256, and whether the job
        changes it), ``folders``, ``limit``, ``grace`` and
        ``wait`` in seconds, ``owner``, and ``lock``, the path of the lease or None.
        """
        folder = self.folder / "jobs" / job
        if _runs(folder) or (folder / "end.json").exists():
            return
        for name in ("work", "tmp", *task["folders"]):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for place, digest, changes in task["files"]:
            self._place(digest, folder / place, changes)
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        (folder / "alive").touch()
        with suppress(FileExistsError):
            os.mkfifo(str(folder / "ended"))
        started, said = os.pipe()
        if os.fork() == 0:
            _detach(folder, task, said)
        os.close(said)
        os.read(started, 1)
        os.close(started)
        os.wait()

    def do_wait(self, job: str, most: float, known: str) -> Dict[str, Any]:
        """The state of a job: ``waiting`` for the lease, ``running`` or ``ended``; returns when it
        has ended or its state is another one than ``known``, or after ``most`` seconds."""
        folder = self.folder / "jobs" / job
        if not (folder / "task.json").is_file():
            raise Refused("lost", "the job is not known here")
        until = time.monotonic() + most
        # The supervisor has this pipe open as long as it lives.
        pipe = os.open(str(folder / "ended"), os.O_RDONLY | os.O_NONBLOCK)
        try:
            while True:
                with suppress(FileNotFoundError):
                    (folder / "alive").touch()
                state = _state(folder)
                left = until - time.monotonic()
                if left <= 0 or state["state"] != known:
                    return state
                readable = select.select([0, pipe], [], [], min(left, 2.0))[0]
                if 0 in readable:  # the next request, or the end of the connection
                    return state
                if readable:  # the supervisor ends at this moment
                    time.sleep(0.01)
        finally:
            os.close(pipe)

    def do_list(self, job: str, under: str) -> List[List[Any]]:
        """The files of a job's folder: path below it, size and SHA-256."""
        top = self.folder / "jobs" / job / under
        files = sorted(path for path in top.rglob("*") if path.is_file())
        return [[str(p.relative_to(top)), p.stat().st_size, _sha256(p)] for p in files]

    def do_read(self, job: str, path: str, offset: int) -> bytes:
        """A block of a file of a job."""
        with (self.folder / "jobs" / job / path).open("rb") as file:
            file.seek(offset)
            return file.read(BLOCK)

    def do_end(self, job: str, keep_mb: float) -> None:
        """Stop a job if it runs, remove its folder, and the files used longest ago above a size."""
        _remove_job(self.folder / "jobs" / job)
        self._prune(keep_mb * 1e6)

    def _stored(self, digest: str) -> Path:
        if not (len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            raise Refused("protocol", f"{digest!r} is no SHA-256")
        return self.folder / "cache" / digest

    def _partial(self, digest: str) -> Path:
        return self._stored(digest).with_suffix(".part")

    def _place(self, digest: str, place: Path, changes: bool) -> None:
        """Link a stored file to its place, after its content was checked; copy one that changes."""
        stored = self._stored(digest)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.exists():
            return
        try:
            sound = _sha256(stored) == digest
        except OSError as error:
            raise Refused("missing", "a file was removed meanwhile") from error
        if not sound:
            stored.unlink()
            raise Refused("missing", "a stored file was damaged, and is removed")
        os.utime(str(stored))
        try:
            if not changes:
                os.link(str(stored), str(place))
                return
        except OSError:  # a file system without links
            pass
        shutil.copyfile(str(stored), str(place))

    def _prune(self, most: float) -> None:
        found = []
        for path in (self.folder / "cache").iterdir():
            with suppress(OSError):
                used = path.stat()
                if not path.suffix:
                    found.append((used.st_mtime, used.st_size, path))
                elif time.time() - used.st_mtime > PARTIAL_DAYS * 86400:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            with suppress(OSError):
                path.unlink()
            total -= size

    def _remove_left_jobs(self) -> None:
        """Remove jobs of connections that were lost for good."""
        for job in (self.folder / "jobs").iterdir():
            with suppress(OSError, ValueError):
                task = json.loads((job / "task.json").read_text(encoding="utf-8"))
                left = time.time() - (job / "alive").stat().st_mtime
                if left > task["grace"] + 3600 and _state(job)["state"] == "ended":
                    shutil.rmtree(str(job), ignore_errors=True)


def _detach(folder: Path, task: Mapping[str, Any], said: int) -> None:
    """The supervisor, in a session of its own without the connection's streams; never returns.

    Args:
        folder: the job's.
        task: see :meth:`Device.do_start`.
        said: a pipe, written to when the supervisor holds the lock by which others see it alive.
    """
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        log = os.open(str(folder / "supervisor"), os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(log, fcntl.LOCK_EX)
        pipe = os.open(str(folder / "ended"), os.O_RDWR)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, stream in enumerate((nothing, nothing, log)):
            os.dup2(stream, number)
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(signum, signal.SIG_IGN)
        os.chdir(str(folder))
        os.write(said, b"1")
        os.close(said)
        _write(folder / "end.json", _supervise(folder, task))
        os.close(pipe)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(0)


def _supervise(folder: Path, task: Mapping[str, Any]) -> Dict[str, Any]:
    """Wait for the lease, run the job, and say how it ended."""
    lease = None
    if task["lock"] is not None:
        lease, holder = _wait_for_lease(folder, task)
        if lease is None:
            return {"why": "leased", "holder": holder}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    begin = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        try:
            child = subprocess.Popen(
                [word.replace("{python}", sys.executable) for word in task["words"]],
                env={
                    **inherited,
                    **task["environment"],
                    "EDGERUN_PARENT": str(os.getpid()),
                    "TMPDIR": str(folder / "tmp"),
                },
                cwd=str(folder / "work"),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=_unblock,
            )
        except OSError as error:
            return {"why": "start", "what": str(error)}
        _write(folder / "group.json", child.pid)
        why = None
        while child.poll() is None:
            # Wakes at the end of the child, and else seldom: this is the measured machine.
            signal.sigtimedwait({signal.SIGCHLD}, RENEWED if task["grace"] > 30 else 0.5)
            if lease is not None:
                _renew(lease, task)
            if child.poll() is None and time.monotonic() - begin > task["limit"]:
                why = "limit"
            elif time.time() - _touched(folder / "alive") > task["grace"]:
                why = "abandoned"
            if why is not None:
                break
        _kill_group(child.pid)  # also processes that the job left behind
        return {"returncode": child.wait(), "why": why}


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _wait_for_lease(
    folder: Path, task: Mapping[str, Any]
) -> Tuple[Optional[IO[str]], Optional[Dict[str, Any]]]:
    """The open lock file, locked; or None and who holds it when the time to wait is over."""
    until = time.monotonic() + task["wait"]
    holder = None
    while True:
        file = _open_lock(Path(task["lock"]))
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _renew(file, task, time.time())
            _write(folder / "state.json", {"state": "running"})
            return file, None
        holder = _holder(file)
        file.close()
        if time.monotonic() > until or time.time() - _touched(folder / "alive") > task["grace"]:
            return None, holder
        _write(folder / "state.json", {"state": "waiting", "holder": holder})
        time.sleep(0.2)


def _open_lock(path: Path) -> IO[str]:
    """Open the lock file, which users share; one that is not writable can still be locked."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(10):
        with suppress(FileNotFoundError):
            try:
                return os.fdopen(os.open(str(path), flags), "r+", encoding="utf-8")
            except PermissionError:
                only_read = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                return os.fdopen(os.open(str(path), only_read), "r", encoding="utf-8")
        with suppress(FileExistsError):
            made = os.open(str(path), flags | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(made, 0o666)
            os.close(made)
    raise OSError(errno.EAGAIN, "it is made and removed again and again", str(path))


def _renew(lease: IO[str], task: Mapping[str, Any], since: Optional[float] = None) -> None:
    if not lease.writable():
        return
    known = since or (_holder(lease) or {}).get("since")
    now = time.time()
    held = {"owner": task["owner"], "pid": os.getpid(), "since": known, "until": now + 6 * RENEWED}
    with suppress(OSError):  # on a full disk the lock itself remains
        lease.seek(0)
        lease.truncate()
        lease.write(json.dumps(held))
        lease.flush()


def _holder(lease: IO[str]) -> Optional[Dict[str, Any]]:
    try:
        lease.seek(0)
        held = json.loads(lease.read(4096))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _state(folder: Path) -> Dict[str, Any]:
    alive = _runs(folder)  # before its last words are read
    end = _read(folder / "end.json")
    if end is not None:
        tails = {name: _tail(folder / name) for name in ("stdout", "stderr")}
        return {"state": "ended", **end, **tails}
    if not alive:
        return {"state": "ended", "why": "supervisor", "what": _tail(folder / "supervisor")}
    return _read(folder / "state.json") or {"state": "running"}


def _runs(folder: Path) -> bool:
    """Whether the supervisor lives: it holds a lock, which a killed one does not."""
    with suppress(OSError), (folder / "supervisor").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove_job(folder: Path) -> None:
    if not folder.is_dir():
        return
    group = _read(folder / "group.json")
    if _runs(folder):
        # The supervisor ends with the job; it ends by itself while it waits for the lease.
        os.utime(str(folder / "alive"), (0, 0))
        if isinstance(group, int):
            _kill_group(group)
        for _ in range(100):
            if not _runs(folder):
                break
            time.sleep(0.05)
    elif isinstance(group, int) and _read(folder / "end.json") is None:
        _kill_group(group)  # its supervisor was killed
    shutil.rmtree(str(folder), ignore_errors=True)


def _kill_group(group: int) -> None:
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _write(path: Path, value: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value), encoding="utf-8")
    new.replace(path)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _text(path: str) -> Optional[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def serve(read: IO[bytes], write: IO[bytes]) -> None:
    """Answer requests until the connection ends."""
    device = Device()
    write.write(f"{READY} 1\n".encode())
    write.flush()
    for line in iter(read.readline, b""):
        request = json.loads(line)
        size, number = request.pop("size", 0), request.pop("id")
        content = read.read(size)
        if len(content) < size:
            return
        given = {**request, "content": content} if size else request
        name = given.pop("do")
        answer: Dict[str, Any] = {}
        data = b""
        try:
            result = getattr(device, f"do_{name}")(**given)
            if isinstance(result, bytes):
                data = result
            answer = {"ok": None if data else result, "size": len(data)}
        except Refused as error:
            answer = {"error": error.kind, "what": error.what}
        except OSError as error:
            full = error.errno in _FULL
            what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
            answer = {"error": "full" if full else "system", "what": what}
        write.write(json.dumps({"id": number, **answer}).encode() + b"\n" + data)
        write.flush()


def main() -> None:
    """Serve standard input and output, which nothing else of this process then uses."""
    # Unbuffered, as "wait" looks at the descriptor whether there is another request.
    read = os.fdopen(os.dup(0), "rb", buffering=0)
    write = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(_Whole(read), write)  # type: ignore[arg-type]


class _Whole:
    """Reads lines and blocks from a descriptor without reading more than is asked for."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def readline(self) -> bytes:
        """A line; what there is of it at the end of the input."""
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = self.raw.read(1)
            if not byte:
                return b""
            line += byte
        return bytes(line)

    def read(self, size: int) -> bytes:
        """That many bytes, fewer at the end of the input."""
        content = bytearray()
        while len(content) < size:
            block = self.raw.read(min(size - len(content), BLOCK))
            if not block:
                break
            content += block
        return bytes(content)


if __name__ == "__main__":
    main()
