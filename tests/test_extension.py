"""Which files decide what the user's own code does."""

import os
import sys

import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data import source_fingerprint
from edgekd.extension import searching, source_files

NUMBER = [0]


@pytest.fixture
def name(tmp_path):
    """A separate package name for each test: Python caches modules by name."""
    NUMBER[0] += 1
    return f"own{os.getpid()}_{NUMBER[0]}"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, text in files.items():
        (folder / f"{stem}.py").write_text(text)
    return folder


def found(reference, folder):
    with searching(folder):
        return {file.resolve() for file in source_files(reference)}


def test_packages_around_a_module_and_relative_imports_belong_to_it(tmp_path, name):
    package = write(tmp_path / name, __init__="", part="from . import other", other="import numpy")
    inner = write(package / "inner", __init__="from ..part import x", leaf="def f(): import json")
    assert found(f"{name}.inner.leaf:f", tmp_path) == {
        package / "__init__.py", inner / "__init__.py", inner / "leaf.py",
        package / "part.py", package / "other.py",
    }  # fmt: skip


def test_a_linked_package_is_the_users_own(tmp_path, name):
    away = write(tmp_path / "away", __init__="from .loss import f", loss="from . import deep")
    write(away, deep="x = 1")
    base = tmp_path / "base"
    base.mkdir()
    (base / name).symlink_to(away)
    write(base, **{f"{name}_net": f"from {name} import loss"})
    assert found(f"{name}_net:Net", base) == {
        base / f"{name}_net.py", away / "__init__.py", away / "loss.py", away / "deep.py"
    }  # fmt: skip


def test_only_a_package_linked_into_site_packages_is_followed(tmp_path, name, monkeypatch):
    site = tmp_path / "lib" / "site-packages"
    write(site / f"{name}_installed", __init__="from . import more", more="")
    away = write(
        tmp_path / "away", __init__=f"from .loss import f\nimport {name}_installed", loss=""
    )
    (site / name).symlink_to(away)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert found(f"{name}:f", tmp_path) == {away / "__init__.py", away / "loss.py"}
    installed = site / f"{name}_installed" / "__init__.py"
    assert found(f"{name}_installed:f", tmp_path) == {installed}


def test_modules_elsewhere_on_the_path_are_followed(tmp_path, name, monkeypatch):
    lib = write(tmp_path / "lib", **{f"{name}_lib": "x = 1"})
    base = write(tmp_path / "base", **{name: f"def f():\n    import {name}_lib, os, numpy"})
    monkeypatch.setattr(sys, "path", [*sys.path, str(lib)])
    assert found(f"{name}:f", base) == {base / f"{name}.py", lib / f"{name}_lib.py"}


def test_an_edited_module_is_read_anew(tmp_path, name):
    base = write(tmp_path, **{name: "", f"{name}_b": ""})
    assert found(f"{name}:f", base) == {base / f"{name}.py"}
    write(tmp_path, **{name: f"import {name}_b"})
    assert found(f"{name}:f", base) == {base / f"{name}.py", base / f"{name}_b.py"}


def test_files_that_a_source_function_reads_belong_to_its_fingerprint(tmp_path, name):
    (tmp_path / "more").mkdir()
    for file in ("d.npy", "given.npy", "more/deep.npy", "unread.npy"):
        np.save(tmp_path / file, np.zeros(3))
    write(
        tmp_path,
        **{
            name: "from pathlib import Path\nimport numpy as np\n"
            "HERE = Path(__file__).parent\n"
            "def load(file): return np.load(HERE / 'd.npy'), np.load(HERE / 'more' / file)\n"
        },
    )
    config = DataConfig(source=f"{name}:load", args={"file": "given.npy"})
    seen = [source_fingerprint(config, tmp_path)]
    for file in ("d.npy", "given.npy", "more/deep.npy"):
        np.save(tmp_path / file, np.ones(3))
        seen.append(source_fingerprint(config, tmp_path))
    assert len({str(entry) for entry in seen}) == 4
    np.save(tmp_path / "unread.npy", np.ones(3))
    assert source_fingerprint(config, tmp_path) == seen[-1]


def test_a_run_folder_named_in_the_code_is_no_input(tmp_path, name):
    write(tmp_path, **{name: "def load(): return open('runs/x'), '.', '..', '/', '~nobody/x'\n"})
    record = tmp_path / "runs" / "n" / "artifacts" / "data" / "0123" / "artifact.json"
    config = DataConfig(source=f"{name}:load", args={"folder": "runs", "here": str(tmp_path)})
    before = source_fingerprint(config, tmp_path)
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    assert source_fingerprint(config, tmp_path) == before
