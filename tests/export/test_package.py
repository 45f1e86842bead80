from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path

import pytest

from tests.command_line import python

PACKAGE = Path(__file__).resolve().parents[2] / "export" / "edgerun"
ALLOWED = {"numpy", "onnxruntime", "edgerun"}


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_each_file_is_python_3_8_and_imports_only_what_a_device_has(file):
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported <= ALLOWED | set(sys.stdlib_module_names)


def test_verify_works_where_neither_numpy_nor_a_runtime_is(tmp_path):
    (tmp_path / "m").write_bytes(b"")
    files = {"m": {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}}
    manifest = {"schema": "edgekd.bundle/1", "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    script = (
        "import sys; sys.modules['numpy'] = sys.modules['onnxruntime'] = None\n"
        "from edgerun.cli import main\n"
        f"sys.exit(main(['verify', {str(tmp_path)!r}]))"
    )
    done = python(script, env={"PYTHONPATH": str(PACKAGE.parent)})
    assert done.stdout == "intact: 1 files\n"


def test_a_missing_runtime_is_said_in_one_message(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"a model")
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from edgerun.cli import main\n"
        "sys.exit(main(['info', 'm.onnx']))"
    )
    done = python(script, env={"PYTHONPATH": str(PACKAGE.parent)}, cwd=tmp_path, code=3)
    assert "onnxruntime is not installed" in done.stderr
    assert "Traceback" not in done.stderr
