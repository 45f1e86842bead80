"""Models and files that need more memory or time than is allowed are errors, in every command."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from edgerun import limits
from edgerun.errors import BadInput
from tests.command_line import edgekd_process, python
from tests.onnx_builders import save_onnx

resource = pytest.importorskip("resource")
linux = pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")

GB = 1 << 30
TABLES = {
    "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  4000 kB\nSwapFree: 1000 kB\n",
    "proc/self/cgroup": "3:cpu,memory:/a/b\n0::/c\n",
}
FIRST = "sys/fs/cgroup/memory/a/memory"
SECOND = "sys/fs/cgroup/c/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 5000 * 1024),
        ({f"{FIRST}.limit_in_bytes": "9000", f"{FIRST}.usage_in_bytes": "2000"}, 7000),
        (
            {
                **{f"{SECOND}.max": "3000", f"{SECOND}.current": "2500"},
                f"{SECOND}.stat": "anon 7\ninactive_file 400\n",
            },
            900,
        ),
        ({f"{SECOND}.max": "max\n", f"{SECOND}.current": "9"}, 5000 * 1024),
        ({"sys/fs/cgroup/memory.max": "8", "sys/fs/cgroup/memory.current": "9"}, 0),
    ],
)
def test_available_memory_is_the_least_of_machine_and_groups(tmp_path, files, expected):
    for name, text in {**TABLES, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert limits.available_memory(tmp_path) == expected


def test_memory_is_not_known_where_linux_does_not_say(tmp_path):
    assert limits.available_memory(tmp_path) is None


@linux
def test_a_limit_holds_for_the_body_alone(monkeypatch):
    monkeypatch.setenv(limits.MEMORY, "1000")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with (
        pytest.raises(BadInput, match="data needs more memory than 1,000 MB") as caught,
        limits.limited_memory("the data", "d.npz"),
    ):
        np.empty(GB * limits.is_limited(), np.uint8)
    assert caught.value.where == "d.npz"
    assert not limits.is_limited()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with limits.limited_memory("the data"), limits.limited_memory("it", most=GB // 4):
        np.empty(GB // 8, np.uint8)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "many"])
def test_a_wrong_limit_is_two(monkeypatch, value):
    for variable, read in (
        (limits.MEMORY, limits.memory_limit),
        (limits.CALL, limits.call_seconds),
    ):
        monkeypatch.setenv(variable, value)
        with pytest.raises(BadInput, match="above 0"):
            read()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``large`` needs gigabytes of activations, ``endless`` computes for days."""
    folder = tmp_path_factory.mktemp("limits")
    doubled = "".join(f"c{i + 1} = Concat <axis = 0> (c{i}, c{i}) " for i in range(30))
    text = f"(float[1,4] x) => (float[n,4] y) {{ c0 = Relu (x) {doubled} y = Relu (c30) }}"
    save_onnx(folder / "large.onnx", text)
    rounds = {"n": np.array(10**6), "yes": np.array(True)}
    body = """(int64 {0}, bool go{0}, float[1,4] v{0}) => (bool on{0}, float[1,4] w{0})
        {{ on{0} = Identity (go{0}) w{0} = {1} }}"""
    inner = body.format("j", "Sin (vj)")
    outer = body.format("i", f"Loop (n, yes, vi) <body = inner {inner}>")
    text = f"(float[1,4] x) => (float[1,4] y) {{ y = Loop (n, yes, x) <body = outer {outer}> }}"
    save_onnx(folder / "endless.onnx", text, rounds)
    np.savez(folder / "x.npz", x=np.ones((2, 4), np.float32))
    return folder


SAYS = {"large": "needs more memory than 600 MB", "endless": "was not run once within 2 s"}
LIMIT = {"large": {limits.MEMORY: "600"}, "endless": {limits.CALL: "2"}}


@linux
@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize("words", ["bench", "run --inputs x.npz --output o.npz"])
def test_edgerun_refuses_what_needs_too_much(models, kind, words):
    environment = {**os.environ, **LIMIT[kind]}
    command, *rest = words.split()
    done = subprocess.run(
        [sys.executable, "-m", "edgerun", command, f"{kind}.onnx", *rest],
        cwd=models,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert SAYS[kind] in done.stderr
    assert not (models / "o.npz").exists()


@linux
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("large", "benchmark"),
        ("large", "build -o out.onnx"),
        ("endless", "build -o out.onnx"),
        ("large", "quantize -o out.onnx --calibration x.npz --method dynamic --no-timing"),
    ],
)
def test_edgekd_refuses_what_needs_too_much(models, tmp_path, kind, words):
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, **LIMIT[kind]}
    environment["TMPDIR"] = str(tmp_path / "tmp")
    command, *rest = (models / w if w == "x.npz" else w for w in words.split())
    model = models / f"{kind}.onnx"
    done = edgekd_process(command, model, *rest, cwd=tmp_path, code=2, env=environment)
    assert SAYS[kind] in " ".join(done.stderr.split())
    assert not (tmp_path / "out.onnx").exists()
    assert not any((tmp_path / "tmp").iterdir())


@linux
def test_edgerun_names_the_signal_that_kills_its_runtime():
    code = (
        "import os, signal\nfrom edgerun.process import supervised\n"
        "raise SystemExit(supervised(lambda: os.kill(os.getpid(), signal.SIGABRT)))"
    )
    done = python(code, code=3)
    assert "the runtime was killed by signal 6 (SIGABRT)" in done.stderr
