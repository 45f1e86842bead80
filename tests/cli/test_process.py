"""A command's exit code means what it says, whatever happens to its streams and its code."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from rich.markup import escape
from rich.table import Table

from edgekd import cli
from edgekd.cli import process, quantize
from edgekd.errors import InputError, printable
from edgekd.progress import Console
from tests.onnx_builders import Graph, save_onnx


@click.command()
@click.argument("kind")
def broken(kind):
    if kind == "panic":
        raise type("PanicException", (BaseException,), {})("index out of bounds")
    raise {
        "bug": ZeroDivisionError("a\n" + "b" * 9000),
        "deep": RecursionError("too deep"),
        "input": InputError("no \x1b[31mred\u202e", where="a\rb"),
        "memory": MemoryError(),
    }[kind]


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setitem(cli._COMMANDS, "broken", (f"{__name__}:broken", ""))
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda *words, **extra: CliRunner().invoke(cli.main, words, **extra)


def _this():
    module = type(sys)(__name__)
    module.broken = broken
    return module


@pytest.mark.parametrize("kind", ["bug", "deep", "panic"])
def test_an_unexpected_error_leaves_a_report_and_no_traceback(run, kind, tmp_path):
    done = run("broken", kind)
    assert done.exit_code == 3
    assert "Traceback" not in done.output
    assert len(done.output) < 1000
    (report,) = (tmp_path / "edgekd/errors").iterdir()
    assert str(report) in done.output.replace("\n", "")
    text = report.read_text()
    assert "Traceback" in text
    assert "onnxruntime: " in text
    assert "Traceback" in run("--debug", "broken", kind).output
    assert "Traceback" in run("broken", kind, env={"EDGEKD_DEBUG": "1"}).output


def test_old_reports_are_removed(run, tmp_path):
    folder = tmp_path / "edgekd/errors"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"20000101-0000{number:02}-1.txt").touch()
    run("broken", "bug")
    assert len(list(folder.iterdir())) == 20


def test_expected_errors_leave_no_report(run, tmp_path):
    assert run("broken", "memory").exit_code == 3
    done = run("broken", "input")
    assert done.exit_code == 2
    assert "no \\x1b[31mred\\u202e\n  where: a\\rb\n" in done.output
    assert run("broken").exit_code == 2  # click's own usage error
    assert run("broken", "--help").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_printable_leaves_what_a_terminal_can_show():
    assert printable("größer: 3 × 4\n\tπ 猫") == "größer: 3 × 4\n\tπ 猫"
    assert printable("\x1b]0;x\x07\ud800\x9b") == r"\x1b]0;x\x07\ud800\x9b"


def command(line, **environment):
    done = subprocess.run(
        ["bash", "-c", line.replace("edgekd", f"{sys.executable} -m edgekd", 1)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("code", "words"), [(0, "profiles list"), (2, "gate none.json --budget no")]
)
def test_the_exit_code_does_not_depend_on_where_the_output_goes(code, words):
    for sink in ("| true", "> /dev/full", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        line = f"edgekd {words} {sink}; exit ${{PIPESTATUS[0]}}"
        found, _, err = command(line)
        assert found == code, (sink, err)
        assert "Traceback" not in err
    assert "output is lost: No space" in command("edgekd profiles list > /dev/full")[2]


def test_a_terminal_without_unicode_gets_escapes(tmp_path):
    (tmp_path / "猫.yaml").write_text("name: 猫\n")
    code, _, err = command(f"edgekd plan {tmp_path}/猫.yaml", PYTHONIOENCODING="latin-1")
    assert code == 2
    assert "\\u732b.yaml" in err
    assert "Traceback" not in err


def test_an_empty_argument_is_refused(run):
    for words in (["run", "p.yaml", "-o", ""], ["gate", "", "--budget", "x"], ["check", "--json="]):
        done = run(*words)
        assert done.exit_code == 2
        assert "empty" in done.output


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's prctl")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_a_command_that_is_ended(number, tmp_path):
    """Whether of the two processes of a command that opens models the first or its child."""
    graph = Graph()
    graph.add("Relu", ["x"], "y")
    graph.save(tmp_path / "m.onnx", {"x": [1, 4]}, {"y": [1, 4]})
    (tmp_path / "tmp").mkdir()
    words = ["benchmark", "m.onnx", "--min-queries", "1000000000", "--max-seconds", "600"]
    with subprocess.Popen(
        [sys.executable, "-m", "edgekd", *words],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        children = []
        while not any("edgerun" in " ".join(child.cmdline()) for child in children):
            assert process.poll() is None
            time.sleep(0.05)
            children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(60)
    assert psutil.wait_procs(children, 60)[1] == []
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert list((tmp_path / "tmp").iterdir()) == []


def test_names_from_data_do_not_control_the_terminal(tmp_path):
    """A title of the terminal (OSC), a deletion of a line and a change of direction are shown."""
    name = "m\x1b]0;title\x07\x9b2J\u202e.onnx"
    (tmp_path / name).write_bytes(b"")
    code, out, err = command(f"edgekd check {shlex.quote(str(tmp_path / name))}")
    assert code == 2
    assert "\\x1b]0;title\\x07\\x9b2J\\u202e.onnx" in out + err
    code, out, err = command("edgekd profiles list", FORCE_COLOR="1")
    assert code == 0
    stream = process._Text(io.BytesIO(), "utf-8")
    stream.write("\x1b[1;31mred\x1b[0m\x1b]52;c;eA==\x07\x1b[2K\x1bc")
    stream.seek(0)
    assert stream.read() == "\x1b[1;31mred\x1b[0m\\x1b]52;c;eA==\\x07\x1b[2K\\x1bc"
    stream.write("\x1b[2J\x1b[?1049h")
    stream.seek(0)
    assert stream.read().endswith("\\x1b[2J\\x1b[?1049h")


def test_a_console_shows_colors_of_names_from_data_as_text():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=60)
    table = Table("[red]own[/red]", title="\x1b[31mtitle")
    table.add_row(escape("[/red]\x1b[8m\r and a long name"))
    console.print(table)
    console.print("\x1b[8mhidden", markup=False, highlight=False)
    assert screen.getvalue().count("\\x1b[8m") == 2
    assert "\\x1b[31mtitle" in screen.getvalue()
    assert "\x1b[8m" not in screen.getvalue()
    assert "\x1b[31m" not in screen.getvalue()


def test_usage_errors_show_control_characters_as_text(run):
    option = "--\x1b[31mred"
    assert "--\\x1b[31mred" in run("gate", option).output


def test_names_of_outputs_and_nodes_are_no_markup():
    record = {"name": "[/red]", "max_absolute": 0.0, "rmse": 0.0, "sqnr_db": 1.0, "cosine": 1.0}
    part = {"kind": "values", "agreement": None, "part": "[/red]"}
    rows = [record | {"argmax_agreement": None, "parts": [part]}]
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    console.print(quantize._errors(rows, {"samples": 2, "calibrated_on": 0, "file": "d"}))
    layer = {"node": "[/red]", "op": "[/blue]", "sqnr_db": None, "own": None}
    console.print(quantize._layers([layer]))
    assert screen.getvalue().count("[/red]") == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["benchmark", "m.onnx", "--max-seconds", "nan"], "not a finite number"),
        (["benchmark", "m.onnx", "--max-seconds", "inf"], "not a finite number"),
        (["quantize", "m.onnx", "--max-drop", "nan"], "not a finite number"),
        (["benchmark", "m.onnx", "--threads", "999999999999"], "1<=x<=1024"),
        (["check", "m.onnx", "--shape", "x=" + "9" * 5000], "is not a shape"),
        (["check", "m.onnx", "--shape", "x=" + "9" * 19], "is not a shape"),
        (["layers", "convnet-xs", "--shape", "image=-1x8x8"], "is not a shape"),
        (["gate", "a" * 5000], "too long"),
        (["verify", "a" * 300], "too long"),
        (["benchmark", "m.onnx", "--inputs", "loop"], "levels of symbolic links"),
        (["check", "loop"], "levels of symbolic links"),
    ],
)
def test_an_impossible_argument_is_two(run, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    save_onnx(tmp_path / "m.onnx", "(float[n,4] x) => (float[n,4] y) { y = Relu (x) }")
    (tmp_path / "loop").symlink_to("loop")
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert says in done.output


def test_memory_that_no_machine_has_is_three_and_no_bug(run):
    done = run("layers", "convnet-xs", "--shape", "image=1x9999999x9999999")
    assert done.exit_code == 3
    assert "the memory ran out" in done.output


def test_an_argument_that_is_not_utf8_is_two(run):
    done = run("check", os.fsdecode(b"\xff.onnx"))
    assert done.exit_code == 2
    assert "not valid UTF-8" in done.output


def test_a_removed_working_folder_is_two(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = run("plan", "../p.yaml")
    assert done.exit_code == 2
    assert "working folder was removed" in done.output


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes")
def test_a_working_folder_that_is_not_utf8_is_two_or_works(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    save_onnx(folder / "m.onnx", "(float[n,4] x) => (float[n,4] y) { y = Relu (x) }")
    np.savez(folder / "x.npz", x=np.ones((2, 4), np.float32))
    (tmp_path / "link").symlink_to(folder)
    inside = f"cd {tmp_path}/caf*; edgekd"
    for words in ("benchmark m.onnx", "check m.onnx", "build m.onnx -o b.onnx", "run p.yaml"):
        code, _, err = command(f"{inside} {words}")
        assert code == 2, err
        assert r"caf\udce9', is not valid UTF-8" in " ".join(err.split())
    code, _, err = command(f"edgekd benchmark {tmp_path}/link/m.onnx")
    assert code == 2, err
    assert "the path is not valid UTF-8" in err
    quick = "--min-queries 1 --max-seconds 0.1"
    for words in (f"bench m.onnx {quick}", "info m.onnx", "run m.onnx --inputs x.npz --output o"):
        assert (
            command(f"{inside} {words}".replace("edgekd", f"{sys.executable} -m edgerun", 1))[0]
            == 0
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_edgerun_cannot_write_is_five(tmp_path):
    edgerun = f"{sys.executable} -m edgerun"
    code, _, err = command(f"{edgerun} info > /dev/full")
    assert code == 5
    assert "the output cannot be written: No space left on device" in err
    assert command(f"{edgerun} info --json /dev/full")[0] == 5
    # What was wrong before is not hidden.
    assert command(f"{edgerun} verify {tmp_path} > /dev/full 2> /dev/full")[0] == 2
    assert command(f"{edgerun} info >&-")[0] == 0
