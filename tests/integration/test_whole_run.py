"""One command leads from the teacher to the bundle; a second call has nothing to do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgekd.pipeline.store import Store
from tests.command_line import edgekd
from tests.integration.pipelines import prepared_images
from tests.onnx_builders import run


def test_every_artifact_is_there(digits_run: Path) -> None:
    result = json.loads((digits_run / "benchmark" / "result.json").read_text())
    assert set(result["models"]) == {"teacher", "baseline", "student"}
    assert result["evidence"] == "measured-on-target"
    for name in ("drop", "speedup", "size_ratio", "gap_closed", "baseline_gain"):
        assert name in result["comparison"]
    assert (digits_run / "report" / "report.html").stat().st_size > 10_000
    assert (digits_run / "report" / "summary.md").is_file()
    assert list((digits_run / "artifacts" / "gate").glob("*/gate.json"))
    junit = next((digits_run / "artifacts" / "gate").glob("*/gate.xml"))
    assert ElementTree.parse(junit).getroot().get("failures") == "0"
    with tarfile.open(digits_run / "bundle" / "digits.tar.gz") as archive:
        assert any(name.endswith("model.onnx") for name in archive.getnames())


def test_every_json_file_names_its_schema(digits_run: Path) -> None:
    files = [*digits_run.glob("artifacts/*/*/*.json"), *digits_run.glob("report/*.json")]
    assert len(files) > 12
    for file in files:
        kind, _, number = json.loads(file.read_text())["schema"].partition("/")
        assert kind.startswith("edgekd."), file
        assert number.isdigit(), file


def test_report_needs_no_network(digits_run: Path) -> None:
    page = (digits_run / "report" / "report.html").read_text()
    for fetching in ("<link", "src=", "@import", "url(http", "<script src"):
        assert fetching not in page


def test_accuracy_is_that_of_the_shipped_file(digits_run: Path) -> None:
    data = next((digits_run / "artifacts" / "data").iterdir())
    model = digits_run / "bundle" / "digits" / "model.onnx"
    logits = run(model, {"image": prepared_images(digits_run, "test")})["logits"]
    accuracy = float((logits.argmax(1) == np.load(data / "test" / "label.npy")).mean())
    result = json.loads((digits_run / "benchmark" / "result.json").read_text())
    assert result["models"]["student"]["metric"]["value"] == accuracy


def test_exported_file_is_what_it_says(digits_run: Path) -> None:
    file = next((digits_run / "artifacts" / "export").glob("*/student.onnx"))
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].name == "image"
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["edgekd.role"] == "student"


def test_second_run_does_nothing_and_says_so(digits_run: Path) -> None:
    folder = digits_run.parent.parent
    before = state_of(digits_run)
    edgekd("plan", "digits.yaml", cwd=folder)
    done = edgekd("run", "digits.yaml", cwd=folder)
    assert "Nothing to do" in done.stdout
    *_, headline, following = done.stdout.splitlines()
    assert headline.startswith("The student reaches ")
    assert "the same student without the teacher" in headline or "istillation" in headline
    assert "edgekd init" in following
    assert state_of(digits_run) == before


def state_of(folder: Path) -> dict[Path, tuple[object, ...]]:
    """Times of change, of files, folders and links alike, and contents."""
    found: dict[Path, tuple[object, ...]] = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[path] = status.st_mtime_ns, status.st_ctime_ns, hashlib.sha256(content).digest()
    return found


@pytest.fixture
def read_only(digits_run: Path, tmp_path: Path) -> Iterator[Path]:
    """The finished run in a folder that nothing can be written to."""
    place = tmp_path / "read-only"
    place.mkdir()
    for options in (["--bind", str(digits_run)], ["-o", "remount,bind,ro"]):
        command = ["mount", *options, str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            subprocess.run(["umount", str(place)], capture_output=True, check=False)
            pytest.skip("a read-only file system needs the right to mount one")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_read_only_folder_is_enough_when_all_is_done(digits_run: Path, read_only: Path) -> None:
    folder = digits_run.parent.parent
    done = edgekd("run", "digits.yaml", "-o", read_only, cwd=folder)
    assert "Nothing to do" in done.stdout
    changed = ("--set", "gate.size.max_mb=2")
    done = edgekd("run", "digits.yaml", "-o", read_only, *changed, cwd=folder, code=2)
    assert "the run folder cannot be written" in done.stderr


def test_run_in_progress_holds_the_folder_where_work_is_left(digits_run: Path) -> None:
    folder = digits_run.parent.parent
    other = Store(digits_run)
    other.acquire()
    try:
        done = edgekd("run", "digits.yaml", cwd=folder)
        assert "Nothing to do" in done.stdout
        assert (digits_run / ".owner").is_file(), "it is the other run's"
        done = edgekd("run", "digits.yaml", "--set", "gate.size.max_mb=2", cwd=folder, code=2)
        assert f"another run (process {os.getpid()}) is using this folder" in done.stderr
    finally:
        other.release()


def test_missing_link_and_damaged_bundle_are_repaired(digits_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits_run.parent.parent, tmp_path / "copy", symlinks=True)
    run_folder = folder / "runs" / "digits"
    (run_folder / "report").unlink()
    archive = run_folder / "bundle" / "digits.tar.gz"
    expected, status = archive.read_bytes(), archive.stat()
    archive.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    done = edgekd("plan", "digits.yaml", cwd=folder)
    assert "bundle     run     its files were damaged" in done.stdout
    done = edgekd("run", "digits.yaml", cwd=folder)
    assert "bundle: damaged on the disk, made again" in done.stdout
    assert archive.read_bytes() == expected
    assert (run_folder / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("student={model: mlp, args: {hiden: [4]}}", "did you mean 'hidden'"),
        ("distill.losses=[hard_label]", "hard_labels"),
        ("gate={}", "the gate has no rule"),
    ],
)
def test_plan_refuses_what_run_refuses(digits_run: Path, change: str, says: str) -> None:
    folder = digits_run.parent.parent
    done = edgekd("plan", "digits.yaml", "--set", change, cwd=folder, code=2)
    assert says in done.stderr
    rest = () if change != "gate={}" else ("--until", "benchmark", "--set", "seed=1")
    edgekd("plan", "digits.yaml", "--set", change, *rest, cwd=folder, code=0 if rest else 2)


def test_plan_names_exactly_what_a_changed_key_reruns(digits_run: Path) -> None:
    folder = digits_run.parent.parent
    for override, first in (
        ("gate.size.max_mb=2", "gate"),
        ("export.samples=9", "export"),
        ("distill.epochs=9", "distill"),
        ("seed=1", "teacher"),
    ):
        done = edgekd("plan", "digits.yaml", "--set", override, cwd=folder)
        rows = [line.split()[:2] for line in done.stdout.splitlines()]
        rows = [row for row in rows if row[1:] in (["run:"], ["run"], ["cached"])]
        actions = dict(rows)
        assert actions[first] == "run", done.stdout
        order = [name for name, _ in rows]
        assert all(actions[name] == "cached" for name in order[: order.index(first)])
        assert override.split("=")[0] in done.stdout


def test_failed_gate_leaves_a_report_and_no_bundle(digits_run: Path) -> None:
    folder = digits_run.parent.parent
    done = edgekd("run", "digits.yaml", "--set", "gate.size.max_mb=0.001", cwd=folder, code=1)
    assert "size.max_mb" in done.stderr
    assert (digits_run / "report" / "report.html").is_file()
    assert not (digits_run / "bundle").exists()
    edgekd("gate", "digits.yaml", cwd=folder)
    # Back to the file's own budgets, for the tests that look at the bundle.
    edgekd("run", "digits.yaml", cwd=folder)
    assert (digits_run / "bundle").is_dir()


def test_gate_alone_on_a_result_file(digits_run: Path, tmp_path: Path) -> None:
    result = digits_run / "benchmark" / "result.json"
    budget = tmp_path / "budget.yaml"
    budget.write_text("size: {max_mb: 1}\n")
    edgekd("gate", result, "--budget", budget, cwd=tmp_path)
    budget.write_text("size: {max_mb: 0.001}\n")
    edgekd("gate", result, "--budget", budget, "--junit", "g.xml", cwd=tmp_path, code=1)
    assert ElementTree.parse(tmp_path / "g.xml").getroot().get("failures") == "1"


def test_result_measured_elsewhere_is_not_shown(digits_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits_run.parent.parent, tmp_path / "copy", symlinks=True)
    changes = ("--set", "profile=raspberry-pi-5", "--set", "gate.accuracy.min=0")
    done = edgekd("run", "digits.yaml", *changes, cwd=folder, code=1)
    assert "inconclusive" in done.stdout
    assert "measured-on-host" in done.stdout
