"""Measuring on a machine that is reached by SSH: a server on this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import yaml

from edgekd.errors import InputError, TargetError
from edgekd.targets import bootstrap, machine_of
from edgekd.targets.connection import failure_of
from edgekd.targets.remote import Job, edgerun_archive
from tests.command_line import edgekd
from tests.onnx_builders import save_onnx
from tests.targets.conftest import make_key

QUICK = {"threads": 1, "min_queries": 20, "max_seconds": 0.3, "memory": False}
ENDLESS = {"threads": 1, "min_queries": 10**9, "max_seconds": 300, "memory": False}
ADD = "(float[batch,2] x) => (float[batch,2] y) { y = Add (x, x) }"
AWKWARD = "a 'b\" $(touch hacked) `c`\n; é.onnx"


@pytest.fixture
def model(tmp_path):
    return save_onnx(tmp_path / "model.onnx", ADD)


def jobs(board):
    return list((board.work / "jobs").iterdir())


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)
    return found


def holder(board):
    """Who holds the board, as the lease's file says; None while nobody has written it."""
    try:
        held = json.loads(board.lock.read_text())
    except (OSError, ValueError):
        return None
    return held if psutil.pid_exists(held["pid"]) else None


def measuring(board):
    """The processes of edgerun on the board."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(board.work) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def clients(board):
    """The processes of ssh that are connected to the board."""
    found = psutil.process_iter(["cmdline"])
    return {p.pid for p in found if f"-p {board.port}" in " ".join(p.info["cmdline"] or ())}


@contextmanager
def during(action):
    """Run an action in a thread beside the body."""
    failed = []

    def act():
        try:
            action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()
    assert not failed, failed


def test_a_benchmark_over_ssh_and_a_second_sends_nothing(board, tmp_path):
    first = save_onnx(tmp_path / AWKWARD, ADD)
    (tmp_path / "other").mkdir()
    second = save_onnx(tmp_path / "other" / AWKWARD, ADD.replace("Add", "Mul"))
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(tmp_path / "d.npz", x=x)
    target = board.target()
    record = target.bench(first, second, inputs=tmp_path / "d.npz", batch=1, **QUICK)
    assert [each["path"] for each in record["models"]] == [str(first), str(second)]
    assert len(record["models"][0]["samples_ms"]) >= 20
    assert record["comparison"]["ratio"] > 0
    target.run(second, tmp_path / "d.npz", tmp_path / "y.npz", threads=1)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"], x * x)
    assert not jobs(board)
    assert not list(Path.cwd().glob("hacked"))
    again = board.target()
    again.bench(first, second, inputs=tmp_path / "d.npz", batch=1, **QUICK)
    assert again.sent == 0
    assert target.sent > 0


def test_weights_in_files_of_their_own_arrive(board, tmp_path):
    rows = np.arange(2000, dtype=np.float32)
    initial = onnx.numpy_helper.from_array(rows, "w")
    text = "(float[2000] x) => (float[2000] y) { y = Add (x, w) }"
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    made.graph.initializer.append(initial)
    path = tmp_path / "m.onnx"
    onnx.save(made, path, save_as_external_data=True, location="m.weights", size_threshold=0)
    assert (tmp_path / "m.weights").is_file()
    np.savez(tmp_path / "d.npz", x=rows)
    board.target().run(path, tmp_path / "d.npz", tmp_path / "y.npz", threads=1)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"].ravel(), 2 * rows)


def test_a_wrong_model_is_named_as_it_is_here(board, tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"hello")
    with pytest.raises(InputError, match="not a complete ONNX model") as caught:
        board.target().bench(bad, **QUICK)
    assert str(bad) in caught.value.where
    with pytest.raises(InputError, match="No such file"):
        board.target().bench(tmp_path / "absent.onnx", **QUICK)
    assert not jobs(board)


def fails(board, model, message, remedy="", **changes):
    with pytest.raises(TargetError, match=message) as caught:
        board.target(**changes).bench(model, **QUICK)
    assert caught.value.exit_code == 4
    assert caught.value.where == "board"
    assert remedy in caught.value.remedy
    return caught.value


def test_each_way_not_to_connect_is_told_apart(board, model, tmp_path):
    other = make_key(tmp_path / "other")
    (tmp_path / "known").write_text(f"[127.0.0.1]:{board.port} {Path(f'{other}.pub').read_text()}")
    (tmp_path / "empty").touch()
    fails(board, model, "does not accept the key", "ssh-copy-id", key=str(other))
    changed = str(tmp_path / "known")
    fails(board, model, "host key .* has changed", "ssh-keygen -R", known_hosts=changed)
    unknown = str(tmp_path / "empty")
    fails(board, model, "host key .* is not known", "fingerprint", known_hosts=unknown)
    fails(board, model, "refuses the connection", "openssh-server", port=1)
    fails(board, model, "no machine named", "address", host="no-such-host.invalid")
    hop = tmp_path / "config"
    hop.write_text("Host *\n  ProxyCommand sleep 1; exit 1\n")
    fails(board, model, "ended before a command ran", "by hand", ssh_config=str(hop))


def test_exit_code_255_of_the_device_is_no_failure_of_ssh(board, model):
    ending = board.script("ends", "echo broken >&2; exit 255")
    fails(board, model, "did not start on .* broken", python=ending)


def test_what_openssh_says_decides_the_cause(board):
    config = board.target().config
    for said, what in {
        "ssh: connect to host x port 22: Connection timed out": "does not answer",
        "ssh: connect to host x port 22: No route to host": "does not answer",
        "/root/.ssh/config: line 1: Bad configuration option: x": "does not accept its config",
        "kex_exchange_identification: read: Connection reset by peer": "ended before a command",
    }.items():
        assert what in failure_of(said, "board", config).what


def test_a_board_without_python_or_runtime_says_so(board, model):
    fails(board, model, "no /absent/python on", "apt install python3", python="/absent/python")
    old = board.script("old", "exit 97")
    fails(board, model, "older than 3.8", "install Python", python=old)
    # Without site-packages.
    bare = board.script("bare", f'exec {sys.executable} -I -S "$@"')
    fails(board, model, "no numpy and no onnxruntime", "target bootstrap board", python=bare)


def test_greetings_of_the_shell_there_are_skipped(board, model, tmp_path):
    # What a start-up file prints comes before what the command prints.
    greeting = tmp_path / "authorized"
    key = (board.folder / "id.pub").read_text()
    command = 'command="echo Welcome; eval \\"$SSH_ORIGINAL_COMMAND\\"" '
    greeting.write_text(command + key)
    allowed = board.folder / "authorized_keys"
    before = allowed.read_text()
    try:
        allowed.write_text(greeting.read_text())
        assert board.target().info()["environment"]["cpus"] == os.cpu_count()
    finally:
        allowed.write_text(before)


def test_a_full_disk_there_is_a_clear_error(board, model, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(place)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    # Where nothing may be mounted, a limit on the size of a file stands for it.
    limited = board.script("limited", f'ulimit -f 32; exec {sys.executable} "$@"')
    changes = {} if mounted else {"python": limited}
    try:
        fails(board, model, "the disk there is full", "free space", folder=str(place), **changes)
        assert not list((place / "cache").iterdir()), "other programs need the space"
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_killed_run_is_told_and_leaves_nothing(board, model):
    def kill_supervisor():
        held = wait_for(lambda: holder(board))
        wait_for(lambda: measuring(board))
        os.kill(held["pid"], signal.SIGKILL)

    with (
        during(kill_supervisor),
        pytest.raises(TargetError, match="supervises the command was killed"),
    ):
        board.target().bench(model, **ENDLESS)
    wait_for(lambda: not measuring(board))

    def kill_edgerun():
        wait_for(lambda: measuring(board))[0].kill()

    with during(kill_edgerun), pytest.raises(TargetError, match=r"signal 9 \(SIGKILL\)"):
        board.target().bench(model, **ENDLESS)
    assert not jobs(board)
    board.target().bench(model, **QUICK)  # no lease is left behind


def test_a_lost_connection_does_not_lose_the_result(board, model):
    target = board.target()

    def cut():
        wait_for(lambda: measuring(board))
        os.kill(target._connection._process.pid, signal.SIGKILL)

    with during(cut):
        record = target.bench(model, **{**QUICK, "max_seconds": 2, "min_queries": 10**9})
    assert record["models"][0]["latency"]["n"] > 20
    assert not jobs(board)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_goes_on_there_when_edgekd_is_ended(board, model, tmp_path, number):
    """After Ctrl-C it is ended at once; a killed edgekd is missed after grace_seconds."""
    before = clients(board)
    file = tmp_path / "targets.yaml"
    file.write_text(yaml.safe_dump({"board": board.settings(grace_seconds=1)}))
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom edgekd.targets import open_target\n"
         "open_target('board').bench(sys.argv[1], min_queries=10**9, max_seconds=300)", str(model)],
        env={**os.environ, "EDGEKD_TARGETS": str(file), "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: measuring(board))
    process.send_signal(number)
    assert process.wait(60) != 0
    wait_for(lambda: not measuring(board) and holder(board) is None)
    wait_for(lambda: clients(board) <= before)


def test_a_run_ends_at_its_time_limit(board, model):
    with pytest.raises(TargetError, match="did not end within 1 s") as caught:
        board.target(limit_seconds=1).bench(model, **ENDLESS)
    assert "limit_seconds" in caught.value.remedy
    assert not measuring(board)


SLOW = """\
import os, select, socket, sys, time
port, share, cut = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
server = socket.create_connection(("127.0.0.1", port))
broken = not cut or os.path.exists(cut[0])
passed = 0
while True:
    for ready in select.select([0, server], [], [])[0]:
        data = os.read(0, 8192) if ready == 0 else server.recv(8192)
        if not data:
            sys.exit()
        server.sendall(data) if ready == 0 else os.write(1, data)
        passed += len(data)
        if not broken and passed > 120_000:
            open(cut[0], "w").close()
            sys.exit()
        time.sleep(len(data) / share)
"""


def proxied(board, tmp_path, *words):
    """A configuration of OpenSSH whose connections go through a program."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = f"{sys.executable} {tmp_path}/slow.py {board.port} {' '.join(map(str, words))}"
    (tmp_path / "ssh_config").write_text(f"Host *\n  ProxyCommand {command}\n")
    return str(tmp_path / "ssh_config")


def test_a_slow_link_that_breaks_resumes_the_upload(board, tmp_path):
    path = tmp_path / "noise.bin"
    path.write_bytes(np.random.default_rng(0).bytes(250_000))
    config = proxied(board, tmp_path, 200_000, tmp_path / "cut")
    target = board.target(ssh_config=config)
    done = target.run_job(Job(["sha256sum", "noise.bin"], "test", sent={"work/noise.bin": path}))
    assert done.returncode == 0
    assert (tmp_path / "cut").exists()
    # One block, at most, was sent twice.
    assert path.stat().st_size <= target.sent <= path.stat().st_size + (1 << 17)


def test_two_at_once_wait_for_each_other(board, model):
    """A second command of the same board: it gives up in time, or runs when the first has ended."""
    wait = board.script("wait", f"while [ ! -e {board.folder}/go ]; do sleep 0.1; done")
    first, said = board.target(), []
    with during(lambda: first.run_job(Job([wait], "first", leased=True))):
        wait_for(lambda: holder(board))
        with pytest.raises(TargetError, match=r"in use by .* \(edgekd first, process") as caught:
            board.target(wait_seconds=0).bench(model, **QUICK)
        assert "wait_seconds" in caught.value.remedy
        second = board.target(said.append, wait_seconds=60)
        with during(lambda: second.bench(model, **QUICK)):
            wait_for(lambda: said)
            (board.folder / "go").touch()
    assert len(said) == 1
    assert "waiting for board: in use by" in said[0]


def test_stored_files_that_were_damaged_are_sent_again(board, model):
    target = board.target()
    target.bench(model, **QUICK)
    for stored in (board.work / "cache").iterdir():
        stored.chmod(0o600)
        if stored.stat().st_size == model.stat().st_size:
            stored.write_bytes(bytes(stored.stat().st_size))
    target.sent = 0
    target.bench(model, **QUICK)
    assert target.sent == model.stat().st_size


def test_the_store_stays_below_its_limit(board, model):
    target = board.target(folder=str(board.folder / "limited board"), cache_mb=0)
    target.bench(model, **QUICK)
    assert not list((board.folder / "limited board" / "cache").iterdir())
    assert edgerun_archive() == edgerun_archive()


@pytest.fixture
def named(board, tmp_path, monkeypatch):
    """The board as a target in the user's file."""
    file = tmp_path / "config" / "targets.yaml"
    monkeypatch.setenv("EDGEKD_TARGETS", str(file))
    settings = board.settings()
    words = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k in
             ("user", "port", "key", "known_hosts", "python", "folder")]  # fmt: skip
    edgekd("target", "add", "pi", settings["host"], *words)
    file.write_text(f"# mine\n{file.read_text()}  lock: {board.lock}\n")
    return file


def test_a_named_target_measures_and_is_described(named, board, model):
    assert "127.0.0.1" in edgekd("target", "list").output
    checked = json.loads(edgekd("target", "check", "pi", "--json").output)
    assert checked["cpus"] == os.cpu_count()
    assert checked["onnxruntime"] is not None
    assert checked["missing"] == []
    out = model.parent / "r.json"
    done = edgekd("benchmark", model, "--target", "pi", "--profile", "raspberry-pi-5",
                  "--min-queries", 20, "--max-seconds", 0.3, "--json", out)  # fmt: skip
    record = json.loads(out.read_text())
    assert (record["target"], record["evidence"]) == ("pi", "measured-on-host")
    assert "not evidence for raspberry-pi-5: it was measured on x86_64" in " ".join(
        done.output.split()
    )
    assert machine_of("pi") != machine_of("local")
    assert machine_of("pi")[1] == checked["machine"]


def test_a_wheel_installs_where_nothing_is(named, board, tmp_path):
    """Neither pip nor a network is needed there; wheels with no content stand for the real ones."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("numpy", "onnxruntime"):
        with zipfile.ZipFile(wheels / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
            info = f"{name}-9.9.dist-info"
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                           "Tag: py3-none-any\n")  # fmt: skip
            wheel.writestr(f"{info}/RECORD", "")
    folder = board.folder / "a new board"
    settings = board.settings(folder=str(folder))
    del settings["python"]
    named.write_text(yaml.safe_dump({"pi": settings}))
    done = edgekd("target", "bootstrap", "pi", "--wheels", wheels)
    assert "numpy 9.9, onnxruntime 9.9" in done.output
    assert (
        str(folder / "venv")
        in json.loads(edgekd("target", "check", "pi", "--json").output)["python"]
    )
    empty = edgekd("target", "bootstrap", "pi", "--wheels", tmp_path / "none", code=2)
    assert "no wheel in the folder" in empty.output


def test_wheel_platforms_follow_the_c_library_there():
    tags = bootstrap.platform_tags("aarch64", "glibc-2.31")
    assert tags[0] == "manylinux_2_31_aarch64"
    assert {"manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= set(tags)
    assert "manylinux_2_32_aarch64" not in tags
