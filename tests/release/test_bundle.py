"""A bundle runs, is the same every time, and no change to it goes unnoticed."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner

from edgekd.cli import main
from edgekd.errors import StageError
from edgekd.files import edgerun_folder
from edgekd.release.bundle import write_archive, write_bundle
from edgekd.release.result import Result
from edgekd.spec import ModelSpec, TensorSpec
from edgerun import manifest as bundle_manifest
from edgerun.errors import BadInput
from edgerun.manifest import verify
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
    # Empty files stand where Python would write byte code, and would read planted one.
    caches = {name for name in files if "pycache" in name}
    assert caches == {"edgerun/__pycache__", "edgerun/tensorrt/__pycache__"}
    assert all((folder / name).read_bytes() == b"" for name in caches)


def test_an_untouched_bundle_is_whole_in_both_forms(made):
    archive, folder, _ = made
    assert verify(folder).intact
    assert verify(archive).intact


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
    # Running it left nothing in it, Python's byte code neither.
    assert verify(folder).intact


def test_every_single_change_is_found(bundle):
    (bundle / "edgerun" / "run.py").unlink()
    (bundle / "edgerun" / "more.py").write_text("pass")
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[-1] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    (bundle / "README.md").write_text("other")
    (bundle / "link").symlink_to("model.onnx")
    problems = verify(bundle).problems
    for start in (
        "missing: edgerun/run.py",
        "extra: edgerun/more.py",
        "changed: model.onnx (same size",
        "changed: README.md",
        "extra: link",
    ):
        assert any(problem.startswith(start) for problem in problems), start
    assert len(problems) == 5


def entries(bundle, change):
    """Rewrite the manifest after a change of its list of files."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    change(content["files"])
    path.write_text(json.dumps(content))


def listing(name):
    """List a file that is not there."""
    return lambda bundle: entries(bundle, lambda f: f.update({name: {"sha256": "", "bytes": 0}}))


def planted_and_listed(name, content=b"x"):
    """A file whose content is no difference, as it is listed."""

    def plant(bundle):
        (bundle / name).write_bytes(content)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        entries(bundle, lambda files: files.update({name: entry}))

    return plant


def cache_in_place_of(name):
    def plant(bundle):
        (bundle / name).unlink()
        (bundle / name).mkdir()
        (bundle / name / "x.pyc").write_bytes(b"code")

    return plant


def twice(bundle):
    path = bundle / "manifest.json"
    entry = '"files": {"model.onnx": {"sha256": "", "bytes": 0},'
    path.write_text(path.read_text().replace('"files": {', entry))


def linked(bundle):
    elsewhere = bundle.parent / "elsewhere.onnx"
    (bundle / "model.onnx").rename(elsewhere)
    (bundle / "model.onnx").symlink_to(elsewhere)


TAMPERED = {
    "byte code of a module": (
        cache_in_place_of("edgerun/__pycache__"),
        ["changed: edgerun/__pycache__ (a folder)", "extra: edgerun/__pycache__/x.pyc"],
    ),
    "byte code of a subpackage": (
        cache_in_place_of("edgerun/tensorrt/__pycache__"),
        ["extra: edgerun/tensorrt/__pycache__/x.pyc"],
    ),
    "a cache beside the model": (
        lambda b: ((b / "__pycache__").mkdir(), (b / "__pycache__/json.pyc").write_bytes(b"x")),
        ["extra: __pycache__/json.pyc"],
    ),
    "a module that would be imported first": (
        lambda b: (b / "numpy.py").write_text("raise SystemExit"),
        ["extra: numpy.py"],
    ),
    "an empty folder": (lambda b: (b / "onnxruntime").mkdir(), ["extra: onnxruntime (a folder)"]),
    "set-uid": (
        lambda b: (b / "edgerun/cli.py").chmod(0o4755),
        ["refused: edgerun/cli.py (it is set to run as its owner)"],
    ),
    "a world-writable file": (
        lambda b: (b / "model.onnx").chmod(0o666),
        ["refused: model.onnx (anyone may change it)"],
    ),
    "a world-writable folder": (
        lambda b: (b / "edgerun").chmod(0o777),
        ["refused: edgerun (anyone may change it)"],
    ),
    "an absolute name": (listing("/etc/hostname"), ["manifest.json lists '/etc/hostname'"]),
    "a name outside": (listing("../x"), ["manifest.json lists '../x'"]),
    "a name of a drive": (listing("c:\\x"), ["manifest.json lists 'c:"]),
    "an over-long name": (listing("n" * 300), ["its name is too long"]),
    "a link to the same content": (linked, ["changed: model.onnx (a link"]),
    "a pipe": (lambda b: os.mkfifo(b / "pipe"), ["extra: pipe (a link, a device or a pipe"]),
    "a file listed twice": (twice, ["manifest.json cannot be read", "'model.onnx' stands there"]),
    "a listed name that moves the cursor": (
        planted_and_listed("\x1b[2K\rintact"),
        ["\\x1b[2K\\rintact (its name has control characters)"],
    ),
    "a deep manifest": (
        lambda b: (b / "manifest.json").write_text("[" * 200_000),
        ["changed: manifest.json cannot be read (RecursionError"],
    ),
    "a manifest that lists nothing": (
        lambda b: entries(b, lambda f: f.clear()),
        ["it lists no file"],
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="modes and pipes")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_bundle_is_found_in_both_forms(bundle, kind, packed):
    assert verify(bundle).intact
    tamper, expected = TAMPERED[kind]
    tamper(bundle)
    path = bundle
    if packed:
        path = bundle.parent / "packed.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(bundle, "fashion-mnist")
    problems = verify(path).problems
    for text in expected:
        assert any(text in problem for problem in problems), problems
    assert all(problem.isprintable() for problem in problems)
    done = CliRunner().invoke(main, ["verify", str(path)])
    assert done.exit_code == 1, done.output


def test_limits_end_the_reading(made, monkeypatch):
    archive, folder, _ = made
    for name, limit in (("MAX_MEMBERS", 5), ("MAX_BYTES", 1000)):
        monkeypatch.setattr(bundle_manifest, name, limit)
        for path in (archive, folder):
            assert any("what follows is not read" in p for p in verify(path).problems)
        monkeypatch.undo()


def test_a_header_that_fills_the_memory_is_refused(made, tmp_path):
    long = member("fashion-mnist/x")
    long.pax_headers = {"comment": "c" * (2 << 20)}
    path = repacked(made[0], tmp_path / "bad.tar.gz", [long])
    assert "longer than 1 MiB" in verify(path).problems[0]


def test_running_leaves_no_byte_code(made, tmp_path):
    folder = shutil.copytree(made[1], tmp_path / "copy")
    command = [sys.executable, "-m", "edgerun", "verify", "."]
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert verify(folder).intact


def test_a_damaged_manifest_is_a_change(bundle):
    (bundle / "manifest.json").write_text("{")
    assert verify(bundle).problems[0].startswith("changed: manifest.json")
    (bundle / "manifest.json").write_text('{"schema": "other", "files": {}}')
    assert "schema" in verify(bundle).problems[0]


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
    assert not verify(repacked(made[0], tmp_path / "bad.tar.gz", [extra])).intact


def test_a_cut_archive_is_damaged(made, tmp_path):
    cut = tmp_path / "cut.tar.gz"
    content = made[0].read_bytes()
    cut.write_bytes(content[: len(content) * 2 // 3])
    assert not verify(cut).intact


def test_what_is_no_bundle_is_bad_input(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "none", tmp_path / "note.txt"):
        with pytest.raises(BadInput):
            verify(path)


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


def test_names_from_data_are_text_in_the_readme(tmp_path):
    tiny_model(tmp_path / "m.onnx")
    names = ("<img src=x onerror=alert(1)>", "[a](http://x)", "a`b|c\n# d\x1b[31m\u202e")
    build(tmp_path / "b", tmp_path / "m.onnx", make_result(), labels=names, name="b")
    readme = (tmp_path / "b" / "README.md").read_text()
    (line,) = (line for line in readme.splitlines() if line.startswith("Classes"))
    assert "&lt;img src=x onerror=alert(1)&gt;, \\[a\\](http://x), a\\`b\\|c # d" in line
    assert "\x1b" not in readme
    assert "\u202e" not in readme
    assert "\n# d" not in readme
