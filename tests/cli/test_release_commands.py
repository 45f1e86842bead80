"""gate, verify and compare as a user calls them: output and exit codes."""

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgekd.cli import main

_SPEC = util.spec_from_file_location(
    "release_sample", Path(__file__).parents[1] / "release" / "conftest.py"
)
sample = util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sample)


def call(*arguments):
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


@pytest.fixture
def result_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(sample.make_result()))
    return path


def budget(tmp_path, text):
    path = tmp_path / "budget.yaml"
    path.write_text(text)
    return path


def test_gate_passes_and_writes_both_files(tmp_path, result_file):
    file = budget(tmp_path, "accuracy: {max_drop: 0.03}\nlatency: {p95_ms: 2}\n")
    junit, out = tmp_path / "g.xml", tmp_path / "g.json"
    code, output = call("gate", result_file, "--budget", file, "--junit", junit, "--json", out)
    assert code == 0, output
    assert "PASSED" in output
    assert json.loads(out.read_text())["passed"] is True
    assert "testsuite" in junit.read_text()


def test_gate_fails_with_one(tmp_path, result_file):
    code, output = call("gate", result_file, "--budget", budget(tmp_path, "size: {max_mb: 0.1}"))
    assert code == 1
    assert "FAILED" in output
    code, _ = call("gate", result_file, "--budget", budget(tmp_path, "accuracy: {max_drop: 0.015}"))
    assert code == 1


def test_gate_takes_the_gate_section_of_a_pipeline(tmp_path, result_file):
    file = budget(tmp_path, "name: x\ngate:\n  size: {max_mb: 0.1}\n")
    assert call("gate", result_file, "--budget", file)[0] == 1


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
    code, output = call("gate", result_file, "--budget", budget(tmp_path, text))
    assert code == 2
    assert word in output


def test_gate_of_something_else_is_two(tmp_path):
    assert (
        call("gate", tmp_path / "none.json", "--budget", budget(tmp_path, "size: {max_mb: 1}"))[0]
        == 2
    )
    assert call("gate", "none.yaml")[0] == 2


def test_gate_with_an_unwritable_output_is_two(tmp_path, result_file):
    file = budget(tmp_path, "size: {max_mb: 1}")
    code, output = call("gate", result_file, "--budget", file, "--json", tmp_path / "no" / "g.json")
    assert code == 2
    assert "cannot be written" in output


def test_verify_of_no_bundle_is_two_and_of_a_changed_one_is_one(tmp_path):
    assert call("verify", tmp_path)[0] == 2
    (tmp_path / "manifest.json").write_text(
        '{"schema": "edgekd.bundle/1", "files": {"a": {"sha256": "0", "bytes": 1}}}'
    )
    code, output = call("verify", tmp_path)
    assert code == 1
    assert "missing: a" in output


def test_compare_shows_results_and_seeds(tmp_path):
    paths = []
    for seed in (0, 1, 2):
        content = sample.make_result() | {"seed": seed}
        paths.append(tmp_path / f"{seed}.json")
        paths[-1].write_text(json.dumps(content))
    out = tmp_path / "c.json"
    code, output = call("compare", *paths, "--json", out)
    assert code == 0, output
    assert "mean over 3 seeds" in output
    assert json.loads(out.read_text())["seed_means"][0]["seeds"] == [0, 1, 2]


def test_release_and_its_commands_load_without_torch():
    modules = "edgekd.cli.gate, edgekd.cli.compare, edgekd.release.gate, "
    modules += "edgekd.release.report, edgekd.release.bundle, edgekd.release.build_result"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
