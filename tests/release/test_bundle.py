"""A bundle runs, is the same every time, and no change to it goes unnoticed."""

import io
import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from edgekd.errors import InputError, StageError
from edgekd.files import edgerun_folder
from edgekd.release.bundle import write_archive, write_bundle
from edgekd.release.bundle_verify import verify_bundle
from edgekd.release.result import Result
from edgekd.spec import ModelSpec, TensorSpec
from tests.onnx_builders import save_onnx
from tests.release.conftest import make_result

SPEC = ModelSpec((TensorSpec("image", ("batch", 1, 2, 2)),), (TensorSpec("logits", ("batch", 3)),))


def tiny_model(path):
    """logits = flatten(image) · W"""
    weights = np.arange(12, dtype=np.float32).reshape(4, 3)
    text = """(float[batch,1,2,2] image) => (float[batch,3] logits)
    { flat = Flatten (image)  logits = MatMul (flat, w) }"""
    save_onnx(path, text, {"w": weights}, opset=18)
    return weights


def build(folder, model, result, **changes):
    parts = {
        "name": "fashion-mnist",
        "spec": SPEC,
        "preprocess": {"image": {"scale": 1 / 255, "mean": [0.5], "std": [0.25]}},
        "labels": ("a", "b", "c"),
        "task": {"name": "classification", "output": "logits"},
        "runtime": {"providers": ["CPUExecutionProvider"], "threads": 1},
        "result": Result.from_json(result),
        "example": {"image": np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2) * 15},
        **changes,
    }
    return write_bundle(folder, model, edgerun_folder(), **parts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One bundle for all tests that only read it: (archive, folder, weights)."""
    base = tmp_path_factory.mktemp("bundle")
    weights = tiny_model(base / "m.onnx")
    archive = build(base / "fashion-mnist", base / "m.onnx", make_result())
    return archive, base / "fashion-mnist", weights


@pytest.fixture
def bundle(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made[1], tmp_path / "copy")


def test_expected_outputs_are_those_of_the_preprocessed_example(made):
    _, folder, weights = made
    raw = np.load(folder / "example.npz")["image"]
    prepared = (raw.astype(np.float32) / 255 - 0.5) / 0.25
    expected = np.load(folder / "expected.npz")["logits"]
    # float32 rounding of a sum of four products of size 40.
    assert np.allclose(expected, prepared.reshape(4, 4) @ weights, atol=1e-4)


def test_the_manifest_lists_every_file_but_itself(made):
    _, folder, _ = made
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["schema"] == "edgekd.bundle/1"
    assert manifest["labels"] == ["a", "b", "c"]
    assert manifest["inputs"][0] == {
        "name": "image",
        "shape": ["batch", 1, 2, 2],
        "dtype": "float32",
    }
    assert not any("pycache" in name for name in files)


def test_an_untouched_bundle_is_whole_in_both_forms(made):
    archive, folder, _ = made
    assert verify_bundle(folder) == []
    assert verify_bundle(archive) == []


def test_the_same_content_is_the_same_archive(made, tmp_path):
    archive, folder, _ = made
    for file in folder.rglob("*"):
        if file.is_file():
            file.touch()
    again = tmp_path / "again.tar.gz"
    write_archive(folder, again)
    assert again.read_bytes() == archive.read_bytes()


def test_the_three_lines_of_the_readme_run_in_the_unpacked_archive(made, tmp_path):
    archive, _, _ = made
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path)
    folder = tmp_path / "fashion-mnist"
    lines = (folder / "README.md").read_text().split("```sh\n")[1].split("```")[0].splitlines()
    assert lines[0].startswith("python -m pip install")
    for line in lines[1:]:
        command = [sys.executable, *line.split("#")[0].split()[1:]]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    outputs = np.load(tmp_path / "outputs.npz")["logits"]
    assert np.array_equal(outputs, np.load(folder / "expected.npz")["logits"])
    # Python's caches, which running it made, are not a change.
    assert verify_bundle(folder) == []


def test_every_single_change_is_found(bundle):
    (bundle / "edgerun" / "run.py").unlink()
    (bundle / "edgerun" / "more.py").write_text("pass")
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[-1] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    (bundle / "README.md").write_text("other")
    (bundle / "link").symlink_to("model.onnx")
    problems = verify_bundle(bundle)
    for start in (
        "missing: edgerun/run.py",
        "extra: edgerun/more.py",
        "changed: model.onnx (same size",
        "changed: README.md",
        "extra: link",
    ):
        assert any(problem.startswith(start) for problem in problems), start
    assert len(problems) == 5


def test_a_damaged_manifest_is_a_change(bundle):
    (bundle / "manifest.json").write_text("{")
    assert verify_bundle(bundle)[0].startswith("changed: manifest.json")
    (bundle / "manifest.json").write_text('{"schema": "other", "files": {}}')
    assert "schema" in verify_bundle(bundle)[0]


def repacked(archive, path, extra):
    """The archive with more members."""
    with tarfile.open(archive) as old, tarfile.open(path, "w:gz") as new:
        for member in old:
            new.addfile(member, old.extractfile(member))
        for member in extra:
            new.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "extra",
    [
        member("../outside"),
        member("/etc/outside"),
        member("fashion-mnist/../../outside"),
        member("fashion-mnist/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("fashion-mnist/hard", tarfile.LNKTYPE, "fashion-mnist/model.onnx"),
        member("fashion-mnist/pipe", tarfile.FIFOTYPE),
        member("fashion-mnist/model.onnx"),
        member("other/file"),
    ],
    ids=lambda info: info.name,
)
def test_an_archive_with_dangerous_or_second_members_is_not_whole(made, tmp_path, extra):
    assert verify_bundle(repacked(made[0], tmp_path / "bad.tar.gz", [extra]))


def test_a_cut_archive_is_damaged(made, tmp_path):
    cut = tmp_path / "cut.tar.gz"
    content = made[0].read_bytes()
    cut.write_bytes(content[: len(content) * 2 // 3])
    assert verify_bundle(cut)


def test_what_is_no_bundle_is_an_input_error(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "none", tmp_path / "note.txt"):
        with pytest.raises(InputError):
            verify_bundle(path)


def test_a_bundle_that_does_not_run_is_not_written(made, result, tmp_path):
    tiny_model(tmp_path / "m.onnx")
    with pytest.raises(StageError, match="does not run"):
        build(
            tmp_path / "b",
            tmp_path / "m.onnx",
            result,
            example={"image": np.zeros((2, 1, 5, 5), np.float32)},
        )
    assert not (tmp_path / "b.tar.gz").exists()
