"""The bundle on a machine that has only Python, numpy and onnxruntime."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import edgekd

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with numpy and onnxruntime only."""
    folder = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", CONSTRAINTS, "numpy", "onnxruntime"], check=True)
    absent = (
        "import importlib.util as u; assert not (u.find_spec('torch') or u.find_spec('edgekd'))"
    )
    subprocess.run([python, "-c", absent], check=True, cwd=folder)
    return python


@pytest.fixture
def bundle(digits_run: Path, tmp_path: Path) -> Path:
    with tarfile.open(digits_run / "bundle" / "digits.tar.gz") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "digits"


@pytest.mark.slow
def test_bundle_runs_where_only_the_runtime_is(device: Path, bundle: Path) -> None:
    def edgerun(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [device, "-m", "edgerun", *arguments],
            cwd=bundle,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    verified = edgerun("verify", ".")
    assert verified.returncode == 0, verified.stderr
    answered = edgerun("run", "model.onnx", "--inputs", "example.npz", "--output", "../y.npz")
    assert answered.returncode == 0, answered.stderr
    with np.load(bundle.parent / "y.npz") as y, np.load(bundle / "expected.npz") as expected:
        np.testing.assert_array_equal(y["logits"], expected["logits"])
    timed = edgerun("bench", "model.onnx", "--min-queries", "100", "--json", "../bench.json")
    assert timed.returncode == 0, timed.stderr
    assert edgerun("info", "model.onnx").returncode == 0


def test_verify_finds_every_change(digits_run: Path, bundle: Path) -> None:
    cwd = bundle.parent
    edgekd("verify", digits_run / "bundle" / "digits.tar.gz", cwd=cwd)
    edgekd("verify", "digits", cwd=cwd)
    changed = bundle / "model.onnx"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")
    (bundle / "requirements.txt").unlink()
    (bundle / "extra.bin").write_bytes(b"x")
    found = edgekd("verify", "digits", cwd=cwd, code=1)
    for name in ("model.onnx", "requirements.txt", "extra.bin"):
        assert name in found.stdout + found.stderr
    shutil.rmtree(bundle)
    edgekd("verify", "digits", cwd=cwd, code=2)
