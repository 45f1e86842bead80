"""Each wrong input gives one clear message, the right exit code, and leaves nothing half done."""

from __future__ import annotations

import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import edgekd

PIPELINE = """\
name: wrong
data: {source: npz, path: d.npz}
teacher: {model: mlp, train: {epochs: 1}}
student: {model: mlp}
distill: {epochs: 1}
gate: {size: {max_mb: 1}}
"""


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {}
    for split, count in (("train", 60), ("test", 30)):
        made[f"{split}_image"] = random.integers(0, 255, (count, 1, 8, 8), dtype=np.uint8)
        made[f"{split}_label"] = np.arange(count) % 3
    return made | changes


def save(folder: Path, **changes: np.ndarray) -> None:
    np.savez(folder / "d.npz", **arrays(**changes))


def cut_npz(folder: Path) -> None:
    save(folder)
    content = (folder / "d.npz").read_bytes()
    (folder / "d.npz").write_bytes(content[: len(content) // 2])


def nan_in_state(folder: Path) -> None:
    state = np.zeros((60, 4), np.float32)
    state[17, 2] = np.nan
    save(folder, train_state=state, test_state=np.zeros((30, 4), np.float32))


def checkpoint_of_another_network(folder: Path) -> None:
    import torch

    save(folder)
    torch.save({"weight": torch.zeros(3)}, folder / "t.pt")


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch harmed",)


def pickled(folder: Path) -> None:
    save(folder)
    (folder / "t.pt").write_bytes(pickle.dumps({"w": Harmful()}))


def cut_onnx(folder: Path) -> None:
    save(folder)
    (folder / "t.onnx").write_bytes(b"\x08\x09\x12\x07pytorch:\xff\xff")


def deep_header(folder: Path) -> None:
    save(folder)
    text = b"{'descr': " + b"(" * 4000 + b")" * 4000 + b"}\n"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    with zipfile.ZipFile(folder / "d.npz", "a") as archive:
        archive.writestr("train_state.npy", header)


def many_arrays(folder: Path) -> None:
    with zipfile.ZipFile(folder / "d.npz", "w") as archive:
        for number in range(10_001):
            archive.writestr(f"{number}.npy", b"")


CASES = {
    "no data file": (lambda folder: None, [], "d.npz"),
    "corrupt data": (cut_npz, [], "d.npz"),
    "empty data": (lambda f: (f / "d.npz").write_bytes(b""), [], "d.npz"),
    "another image size": (save, ["data.image_size=[16, 16]"], "8"),
    "label out of range": (
        lambda f: save(f, train_label=np.where(np.arange(60) == 7, -2, np.arange(60) % 3)),
        [],
        "-2",
    ),
    "NaN in the data": (nan_in_state, [], "17"),
    "checkpoint that does not fit": (
        checkpoint_of_another_network,
        ["teacher={model: mlp, checkpoint: t.pt}"],
        "weight",
    ),
    "missing checkpoint": (save, ["teacher={model: mlp, checkpoint: t.pt}"], "t.pt"),
    "pickle": (pickled, ["teacher={model: mlp, checkpoint: t.pt}"], "pickle"),
    "truncated ONNX": (cut_onnx, ["teacher={onnx: t.onnx}"], "truncated"),
    "missing ONNX": (save, ["teacher={onnx: t.onnx}"], "t.onnx"),
    "contradicting budget": (save, ["gate.latency={p50_ms: 2, p90_ms: 1}"], "contradicts"),
    "wrong model arguments": (save, ["student.args={hiden: [3]}"], "hidden"),
    "a pipe as data": (lambda f: os.mkfifo(f / "d.npz"), [], "this is a pipe"),
    "a pipe as checkpoint": (
        lambda f: (save(f), os.mkfifo(f / "t.pt")),
        ["teacher={model: mlp, checkpoint: t.pt}"],
        "t.pt",
    ),
    "a pipe as ONNX": (
        lambda f: (save(f), os.mkfifo(f / "t.onnx")),
        ["teacher={onnx: t.onnx}"],
        "t.onnx",
    ),
    "a deep header in the data": (deep_header, [], "train_state"),
    "too many arrays": (many_arrays, [], "10,001 arrays"),
    "a single number as data": (
        lambda f: save(f, train_state=np.float32(1), test_state=np.float32(1)),
        [],
        "single number",
    ),
    "no gate at all": (save, ["gate={}"], "gate"),
    "a file as run folder": (save, ["name=taken"], "taken"),
    **{
        f"something in the way of {name}": (
            lambda f, name=name: (save(f), (f / "runs" / "wrong" / name).mkdir(parents=True)),
            ["gate={}"],
            says,
        )
        for name, says in ((".lock", "run folder"), (".owner", "gate"), ("log.jsonl", "the log"))
    },
}


@pytest.mark.parametrize("case", list(CASES))
def test_one_message_and_exit_code_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, overrides, says = CASES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "taken").write_text("")
    prepare(tmp_path)
    options = [word for override in overrides for word in ("--set", override)]
    outcome = edgekd("run", "p.yaml", *options, code=2)
    assert says in outcome.output
    assert "to do:" in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.output.count("error:") == 1
    assert not (tmp_path / "harmed").exists()
    assert not list(tmp_path.glob("runs/wrong/artifacts/*/.tmp-*"))


def test_loss_that_becomes_nan_names_step_and_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(PIPELINE)
    save(tmp_path)
    (tmp_path / "odd.py").write_text(
        "def root(student, target):\n    return (0 * student).sum().log()\n"
    )
    outcome = edgekd("run", "p.yaml", "--set", "distill.losses=[hard_labels, 'odd:root']", code=3)
    assert "step 1" in outcome.output
    assert "hard_labels" in outcome.output
    assert "root" in outcome.output


def test_full_disk_leaves_with_3_and_a_store_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a file system that can be filled needs the right to mount one")
    try:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "p.yaml").write_text(PIPELINE)
        save(tmp_path)
        run = ["run", "p.yaml", "-o", str(small / "run")]
        outcome = edgekd(*run, "--set", "teacher.args={hidden: [900]}", code=3)
        assert "the disk is full" in outcome.output
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        again = edgekd(*run, "--until", "distill")
        assert "data: unchanged, skipped" in again.output
    finally:
        subprocess.run(["umount", "-l", small], check=True)
