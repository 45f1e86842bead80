from __future__ import annotations

import hashlib
import json

import pytest

from edgerun.errors import BadInput
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
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    return tmp_path


def test_an_untouched_bundle_is_intact_even_after_python_ran_in_it(bundle):
    (bundle / "edgerun/__pycache__").mkdir()
    (bundle / "edgerun/__pycache__/run.pyc").write_bytes(b"x")
    assert verify(bundle).intact
    done = edgerun("verify", bundle)
    assert done.stdout == "intact: 3 files\n"


@pytest.mark.parametrize("content", [b"mode1", b"longer model", b""])
def test_a_changed_file_is_named_also_when_its_size_is_the_same(bundle, content):
    (bundle / "model.onnx").write_bytes(content)
    done = edgerun("verify", bundle, code=1)
    assert done.stdout == "changed: model.onnx\n"


def test_missing_and_extra_files_are_named(bundle):
    (bundle / "edgerun/run.py").unlink()
    (bundle / "edgerun/new.py").write_bytes(b"run")
    verdict = verify(bundle)
    assert not verdict.intact
    assert verdict.lines() == ["missing: edgerun/run.py", "extra: edgerun/new.py"]


def test_a_link_is_not_the_file_it_points_to(bundle, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.onnx"
    elsewhere.write_bytes(b"model")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(elsewhere)
    (bundle / "folder").symlink_to(elsewhere.parent)
    assert verify(bundle).lines() == ["changed: model.onnx", "extra: folder"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", "./model.onnx"])
def test_a_manifest_that_reaches_outside_is_refused(bundle, name):
    (bundle / "manifest.json").write_text(json.dumps({"files": {name: {"sha256": "", "bytes": 0}}}))
    with pytest.raises(BadInput, match="not a plain path inside"):
        verify(bundle)


@pytest.mark.parametrize("content", ["", "[]", '{"files": 3}', '{"files": {"a": "b"}}'])
def test_an_unreadable_manifest_is_bad_input(bundle, content):
    (bundle / "manifest.json").write_text(content)
    done = edgerun("verify", bundle, code=2)
    assert "manifest cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
