"""Every command opens no connection, and writes nothing outside its output, run and cache.

ONNX Runtime, for one, would look up a host for its telemetry and store an identifier in the cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekd.files import edgerun_folder
from tests.cli.quantizing import classifier, samples

ROOT = Path(__file__).resolve().parents[2]

PIPELINE = """\
name: small
data: {source: digits}
teacher: {model: convnet-xs, train: {epochs: 2, batch_size: 64, learning_rate: 1e-2}}
student: {model: convnet-xs}
distill: {epochs: 1, batch_size: 64, learning_rate: 1e-2, baseline: false}
benchmark: {min_queries: 20, max_seconds: 0.2, against: none}
gate: {evidence: measured-on-host, size: {max_mb: 1}, accuracy: {beat_constant: false}}
"""
QUICK = "--min-queries 10 --max-seconds 0.2"
COMMANDS = f"""\
edgekd init example.yaml
edgekd init --schema schema.json
edgekd doctor
edgekd profiles list
edgekd profiles show host
edgekd profiles check
edgekd plan p.yaml
edgekd run p.yaml
edgekd bundle p.yaml
edgekd layers p.yaml
edgekd compare runs/small runs/small --json compare.json
edgekd gate runs/small/benchmark/result.json --budget b.yaml --junit gate.xml --json gate.json
edgekd verify runs/small/bundle/small.tar.gz
edgekd check m.onnx --json check.json
edgekd build m.onnx -o built.onnx
edgekd quantize m.onnx -o q.onnx --calibration d.npz --no-timing
edgekd benchmark m.onnx --against q.onnx {QUICK} --json benchmark.json
edgerun info m.onnx --json info.json
edgerun probe m.onnx
edgerun run m.onnx --inputs d.npz --output outputs.npz
edgerun bench m.onnx --against q.onnx {QUICK} --json bench.json
edgerun verify runs/small/bundle/small
"""
GIVEN = {"p.yaml", "b.yaml", "m.onnx", "d.npz"}
WRITTEN = {"example.yaml", "schema.json", "runs", "built.onnx", "q.onnx", "outputs.npz", "gate.xml"}
WRITTEN |= {f"{name}.json" for name in ("compare", "gate", "check", "benchmark", "info", "bench")}

DRIVER = """
import json, os, runpy, subprocess, sys
import torch
def note(event, args):
    if event.startswith("socket.") and event != "socket.__new__":
        print(os.getpid(), event, args, file=open("../python-events", "a"))
sys.addaudithook(note)
codes = {}
for line in sys.stdin.read().splitlines():
    program, *words = line.split()
    if program == "edgerun":
        codes[line] = subprocess.run([sys.executable, "-m", program, *words]).returncode
    elif child := os.fork():
        codes[line] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    else:
        sys.argv = [program, *words]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        os._exit(0)
json.dump(codes, open("../codes", "w"))
"""
"""Each command in a fork, so that torch is imported once; edgerun starts without it."""

SENDING = "socket,connect,sendto,sendmsg,sendmmsg"
CREATING = "open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
STRACE = ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-e", "signal=none"]
NAMESPACE = ["unshare", "--map-root-user", "--net"]


@dataclass(frozen=True)
class Isolated:
    """What the commands did: exit codes, and, where strace may trace, their system calls."""

    base: Path
    codes: dict[str, int]
    output: str
    calls: list[str] | None
    """None without strace."""
    offline: bool
    """Without strace: whether there was no network interface."""


def works(*words: str) -> bool:
    return bool(shutil.which(words[0])) and not subprocess.run(words, check=False).returncode


@pytest.fixture(scope="module")
def isolated(tmp_path_factory) -> Isolated:
    base = tmp_path_factory.mktemp("isolated")
    work, log = base / "work", base / "calls"
    for name in ("work", "home", "tmp", "cache"):
        (base / name).mkdir()
    (work / "p.yaml").write_text(PIPELINE)
    (work / "b.yaml").write_text("size: {max_mb: 1}\n")
    classifier(work / "m.onnx")
    samples(work / "d.npz")
    traced = works(*STRACE, "-o", str(log), "-e", "trace=connect", "true")
    offline = not traced and works(*NAMESPACE, "true")
    trace = [*STRACE, "-o", str(log), "-e", f"trace={SENDING},{CREATING}"]
    environment = os.environ | {
        "HOME": str(base / "home"),
        "TMPDIR": str(base / "tmp"),
        "XDG_CACHE_HOME": str(base / "cache"),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, edgerun_folder().parent))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for name in ("ORT_DISABLE_TELEMETRY", "TORCHINDUCTOR_CACHE_DIR"):  # set by other tests
        environment.pop(name, None)
    done = subprocess.run(
        [*(trace if traced else NAMESPACE if offline else []), sys.executable, "-c", DRIVER],
        input=COMMANDS,
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    codes = json.loads((base / "codes").read_text()) if not done.returncode else {}
    calls = log.read_text(errors="replace").splitlines() if traced else None
    return Isolated(base, codes, done.stdout + done.stderr, calls, offline)


def created(call: str, work: Path) -> Path | None:
    """The file that a system call makes; None for one that only opens a file."""
    if "open" in call.split("(")[0] and "O_CREAT" not in call:
        return None
    # The last of the paths, behind the folder that it is relative to.
    found = re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', call)
    return Path(os.path.normpath(Path(found[-1][0] or work, found[-1][1]))) if found else None


def test_every_command_works_in_fresh_folders(isolated):
    assert list(isolated.codes) == COMMANDS.splitlines(), isolated.output
    assert set(isolated.codes.values()) == {0}, f"{isolated.codes}\n{isolated.output}"


def test_no_command_connects(isolated):
    # Of native code, too, with strace; else it is shown that no command needs a connection.
    events = isolated.base / "python-events"
    assert not events.exists(), events.read_text()
    if isolated.calls is None and not isolated.offline:
        pytest.skip("neither strace nor a network namespace (unshare) may be used here")
    names = tuple(f"{name}(" for name in SENDING.split(","))
    sent = [call for call in isolated.calls or () if any(name in call for name in names)]
    assert [call for call in sent if "AF_UNIX" not in call] == []


def test_no_command_writes_elsewhere(isolated):
    base, work = isolated.base, isolated.base / "work"
    assert {path.name for path in work.iterdir()} == GIVEN | WRITTEN
    assert [*(base / "home").iterdir(), *(base / "tmp").iterdir()] == []
    assert [path.name for path in (base / "cache").iterdir()] == ["edgekd"]
    names = tuple(f"{name}(" for name in CREATING.split(","))
    calls = [call for call in isolated.calls or () if any(name in call for name in names)]
    made = {path for call in calls if (path := created(call, work))}
    elsewhere = [path for path in sorted(made) if not path.is_relative_to(base)]
    # Semaphores, which joblib makes and removes when scikit-learn is imported.
    semaphores = Path("/dev/shm").glob("sem.*")
    gone = {path for path in elsewhere if path.name.startswith("sem.")} - set(semaphores)
    assert [path for path in elsewhere if path not in gone] == []
