"""Targets of any size are learnt, and what a constant has too is not shipped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import edgekd

PIPELINE = """\
name: prices
task: regression
data: {source: npz, path: prices.npz}
teacher: {model: mlp, train: {epochs: 10, batch_size: 64, learning_rate: 3e-3}}
student: {model: mlp}
distill: {epochs: 10, batch_size: 64, learning_rate: 3e-3, baseline: false}
quantize: {int8: dynamic}
benchmark: {min_queries: 100, max_seconds: 2}
gate: {accuracy: {max_drop: 0.1}, size: {max_mb: 1}}
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A finished run on prices in euros, about 150,000: its folder and the test split's prices."""
    folder, random, arrays = tmp_path_factory.mktemp("prices"), np.random.default_rng(0), {}
    for split, count in (("train", 1000), ("test", 300)):
        features = random.normal(0, 1, (count, 6)).astype(np.float32)
        price = 150_000 + 60_000 * features[:, :1] + 30_000 * np.abs(features[:, 1:2])
        arrays |= {f"{split}_features": features, f"{split}_target": price.astype(np.float32)}
    np.savez(folder / "prices.npz", **arrays)
    (folder / "p.yaml").write_text(PIPELINE)
    edgekd("run", "p.yaml", cwd=folder)
    return folder, arrays["test_target"]


def test_prices_are_learnt_and_the_file_answers_in_euros(shipped) -> None:
    folder, prices = shipped
    run = folder / "runs" / "prices"
    result = json.loads((run / "benchmark" / "result.json").read_text())
    constant = result["constant"]["value"]
    assert constant == pytest.approx(float(np.abs(prices - np.median(prices)).mean()), rel=0.05)
    assert result["models"]["student"]["metric"]["value"] < 0.3 * constant
    assert result["comparison"]["relative_drop"]["unit"] == "of the constant's error"
    with np.load(run / "bundle" / "prices" / "expected.npz") as expected:
        assert np.abs(expected["prediction"] - prices[:8]).mean() < 0.3 * constant

    # The weights of one pipeline are the teacher of another: their unit goes with them.
    weights = next((run / "artifacts").rglob("student.safetensors"))
    teacher = f"teacher: {{model: mlp, checkpoint: {weights}}}"
    lines = [teacher if line.startswith("teacher:") else line for line in PIPELINE.splitlines()]
    (folder / "again.yaml").write_text("\n".join(lines).replace("name: prices", "name: again"))
    edgekd("run", "again.yaml", "--until", "teacher", cwd=folder)
    known = json.loads(next((folder / "runs/again").rglob("validation.json")).read_text())
    assert known["mae"] < 0.3 * known["chance"]


def test_a_student_no_better_than_a_constant_is_not_shipped(shipped, tmp_path: Path) -> None:
    folder = shutil.copytree(shipped[0], tmp_path / "prices", symlinks=True)
    untaught = ("--set", "distill.epochs=1", "--set", "distill.learning_rate=1e-9")
    untaught += ("--set", "gate.accuracy.max_drop=null")
    done = edgekd("run", "p.yaml", *untaught, cwd=folder, code=1)
    assert "not better than a constant" in done.stdout
    assert "accuracy.beat_constant" in done.stderr
    assert not (folder / "runs" / "prices" / "bundle").exists()
    untaught += ("--set", "gate.accuracy.beat_constant=false")
    assert "not better than a constant" in edgekd("run", "p.yaml", *untaught, cwd=folder).stdout
