"""Two inputs and a continuous output go through every stage: nothing assumes images and classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

PIPELINE = """\
name: reach
task: policy
data: {source: npz, path: episodes.npz}
teacher: {model: policy-l, train: {epochs: 6, batch_size: 64}}
student: {model: policy-s}
distill: {epochs: 6, batch_size: 64, baseline: false}
benchmark: {min_queries: 200, max_seconds: 2}
gate: {accuracy: {max: 1.0}, size: {max_mb: 1}}
"""


def episodes(count: int, seed: int) -> dict[str, np.ndarray]:
    """A camera that sees the goal as a bright pixel, the arm's position, and the way to go."""
    random = np.random.default_rng(seed)
    goal = random.integers(0, 12, (count, 2))
    image = random.integers(0, 40, (count, 12, 12, 3), dtype=np.uint8)
    image[np.arange(count), goal[:, 0], goal[:, 1]] = 255
    state = random.uniform(0, 1, (count, 2)).astype(np.float32)
    action = (goal / 11 - state).astype(np.float32)
    return {"image": image.transpose(0, 3, 1, 2), "state": state, "action": action}


def test_policy_through_every_stage(tmp_path: Path, edgekd) -> None:
    splits = {"train": episodes(1200, 0), "test": episodes(300, 1)}
    np.savez(
        tmp_path / "episodes.npz",
        **{f"{split}_{name}": a for split, arrays in splits.items() for name, a in arrays.items()},
    )
    (tmp_path / "p.yaml").write_text(PIPELINE)
    edgekd("run", "p.yaml")

    run = tmp_path / "runs" / "reach"
    result = json.loads((run / "benchmark" / "result.json").read_text())
    assert result["task"] == {"name": "policy", "metric": "mae", "higher_is_better": False}
    untaught = float(np.abs(splits["test"]["action"] - splits["train"]["action"].mean(0)).mean())
    assert result["models"]["student"]["metric"]["value"] < 0.9 * untaught

    manifest = json.loads((run / "bundle" / "reach" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["inputs"]] == ["image", "state"]
    assert [entry["name"] for entry in manifest["outputs"]] == ["action"]
    with np.load(run / "bundle" / "reach" / "expected.npz") as expected:
        assert expected["action"].shape == (8, 2)
