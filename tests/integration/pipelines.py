"""A short pipeline, and the images of a run as its network takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

DIGITS = """\
name: digits
data: {source: digits}
teacher: {model: convnet-m, train: {epochs: 6, batch_size: 64, learning_rate: 3e-3}}
student: {model: convnet-xs}
distill: {epochs: 8, batch_size: 64, learning_rate: 1e-2}
benchmark: {min_queries: 200, max_seconds: 2}
gate:
  accuracy: {min: 0.5}
  size: {max_mb: 1}
  memory: {peak_mb: 500}
"""


def prepared_images(run: Path, split: str) -> np.ndarray:
    """The images of a split, normalized by the constants in the bundle's manifest."""
    (manifest,) = (run / "bundle").glob("*/manifest.json")
    constants = json.loads(manifest.read_text())["preprocess"]["image"]
    data = next((run / "artifacts" / "data").iterdir())
    images = np.load(data / split / "image.npy").astype(np.float32)
    mean, std = (np.float32(constants[key]).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    return (images * np.float32(constants["scale"]) - mean) / std
