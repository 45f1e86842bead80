"""gate, verify and compare as a user calls them: output and exit codes."""

import json
import os

import pytest

from edgerun.errors import BadInput
from edgerun.manifest import read_manifest
from tests.command_line import check_not_imported, edgekd
from tests.release.conftest import make_result


@pytest.fixture
def result_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(make_result()))
    return path


def budget(tmp_path, text):
    path = tmp_path / "budget.yaml"
    path.write_text(text)
    return path


def test_gate_passes_and_writes_both_files(tmp_path, result_file):
    file = budget(tmp_path, "accuracy: {max_drop: 0.03}\nlatency: {p95_ms: 2}\n")
    junit, out = tmp_path / "g.xml", tmp_path / "g.json"
    done = edgekd("gate", result_file, "--budget", file, "--junit", junit, "--json", out)
    assert "PASSED" in done.output
    assert json.loads(out.read_text())["passed"] is True
    assert "testsuite" in junit.read_text()


def test_gate_fails_with_one(tmp_path, result_file):
    done = edgekd("gate", result_file, "--budget", budget(tmp_path, "size: {max_mb: 0.1}"), code=1)
    assert "FAILED" in done.output
    done = edgekd(
        "gate",
        result_file,
        "--budget",
        budget(tmp_path, "accuracy: {max_drop: 0.015}"),
        code=1,
    )


def test_gate_takes_the_gate_section_of_a_pipeline(tmp_path, result_file):
    file = budget(tmp_path, "name: x\ngate:\n  size: {max_mb: 0.1}\n")
    edgekd("gate", result_file, "--budget", file, code=1)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sise: {max_mb: 1}", "size"),
        ("size: {max_mb: many}", "max_mb"),
        ("latency: {p50_ms: 3, p95_ms: 2}", "contradicts"),
        ("size: {}", "no rule"),
        ("size: [", "YAML"),
    ],
)
def test_a_wrong_budget_file_is_named_with_two(tmp_path, result_file, text, word):
    done = edgekd("gate", result_file, "--budget", budget(tmp_path, text), code=2)
    assert word in done.output


def test_gate_of_something_else_is_two(tmp_path):
    file = budget(tmp_path, "size: {max_mb: 1}")
    edgekd("gate", tmp_path / "none.json", "--budget", file, code=2)
    edgekd("gate", "none.yaml", code=2)


def test_gate_with_an_unwritable_output_is_two(tmp_path, result_file):
    file = budget(tmp_path, "size: {max_mb: 1}")
    done = edgekd(
        "gate",
        result_file,
        "--budget",
        file,
        "--json",
        tmp_path / "no" / "g.json",
        code=2,
    )
    assert "in a folder that does not exist" in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("gate", "r.json", "--budget", "b.yaml", "--json", "r.json"),
        ("gate", "r.json", "--budget", "b.yaml", "--junit", "b.yaml"),
        ("gate", "r.json", "--budget", "b.yaml", "--json", "new", "--junit", "new"),
        ("compare", "r.json", "--json", "r.json"),
    ],
)
def test_an_output_never_overwrites_a_file_that_is_read(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps(make_result()))
    (tmp_path / "b.yaml").write_text("size: {max_mb: 1}")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert "would overwrite another file" in edgekd(*words, code=2).output
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("words", [("gate",), ("compare", "r.json")])
def test_a_pipe_or_device_as_a_result_is_refused_unread(tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps(make_result()))
    make(tmp_path / "odd.json")
    assert ", not a file" in edgekd(*words, "odd.json", code=2).output


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_text("[" * 100_000)])
def test_a_manifest_that_cannot_be_parsed_is_refused(tmp_path, make):
    make(tmp_path / "manifest.json")
    with pytest.raises(BadInput):
        read_manifest(tmp_path / "manifest.json")


def test_verify_of_no_bundle_is_two_and_of_a_changed_one_is_one(tmp_path):
    edgekd("verify", tmp_path, code=2)
    (tmp_path / "manifest.json").write_text(
        '{"schema": "edgekd.bundle/1", "files": {"a": {"sha256": "0", "bytes": 1}}}'
    )
    done = edgekd("verify", tmp_path, code=1)
    assert "missing: a" in done.output


def test_compare_shows_results_and_seeds(tmp_path):
    paths = []
    for seed in (0, 1, 2):
        content = make_result() | {"seed": seed}
        paths.append(tmp_path / f"{seed}.json")
        paths[-1].write_text(json.dumps(content))
    out = tmp_path / "c.json"
    done = edgekd("compare", *paths, "--json", out)
    assert "mean over 3 seeds" in done.output
    assert json.loads(out.read_text())["seed_means"][0]["seeds"] == [0, 1, 2]


def test_release_and_its_commands_load_without_torch():
    modules = "edgekd.cli.gate, edgekd.cli.compare, edgekd.release.gate, "
    modules += "edgekd.release.report, edgekd.release.bundle, edgekd.release.build_result"
    check_not_imported({"torch"}, f"import {modules}")
