from __future__ import annotations

import hashlib
import json

import pytest

from edgerun.manifest import verify
from tests.command_line import edgerun


@pytest.fixture
def bundle(tmp_path):
    contents = {"model.onnx": b"model", "edgerun/run.py": b"run", "README.md": b"read"}
    files = {}
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest = {"schema": "edgekd.bundle/1", "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_an_untouched_bundle_is_intact(bundle):
    assert verify(bundle).intact
    done = edgerun("verify", bundle)
    assert done.stdout == "intact: 3 files\n"


@pytest.mark.parametrize("content", [b"mode1", b"longer model", b""])
def test_a_changed_file_is_named_also_when_its_size_is_the_same(bundle, content):
    (bundle / "model.onnx").write_bytes(content)
    done = edgerun("verify", bundle, code=1)
    assert done.stdout.startswith("changed: model.onnx (")
    assert done.stdout.count("\n") == 1


def test_missing_and_extra_files_are_named(bundle):
    (bundle / "edgerun/run.py").unlink()
    (bundle / "edgerun/new.py").write_bytes(b"run")
    verdict = verify(bundle)
    assert not verdict.intact
    assert verdict.problems == ("extra: edgerun/new.py", "missing: edgerun/run.py")


def test_a_link_is_not_the_file_it_points_to(bundle, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.onnx"
    elsewhere.write_bytes(b"model")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(elsewhere)
    (bundle / "folder").symlink_to(elsewhere.parent)
    kinds = [problem.split(" (")[0] for problem in verify(bundle).problems]
    assert kinds == ["extra: folder", "changed: model.onnx"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", "./model.onnx"])
def test_a_manifest_that_reaches_outside_is_refused(bundle, name):
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = {"sha256": "", "bytes": 0}
    path.write_text(json.dumps(content))
    (problem,) = verify(bundle).problems
    assert "not a plain path inside" in problem


LISTED = '{"schema": "edgekd.bundle/1", "files": {"model.onnx": {"sha256": "0", "bytes": %s}}}'


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", '{"files": 3}', '{"files": {"a": "b"}}', "\xff"),
        *(LISTED % size for size in ("1e999", "NaN", '"5"', "5.5", "true", "null")),
    ],
)
def test_an_unreadable_manifest_is_a_change(bundle, content):
    (bundle / "manifest.json").write_text(content, encoding="latin-1")
    done = edgerun("verify", bundle, code=1)
    assert "changed: manifest.json cannot be read" in done.stdout
    assert "Traceback" not in done.stderr
