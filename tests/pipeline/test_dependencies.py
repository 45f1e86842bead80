"""The code that a stage depends on is what it imports and uses, and all that it runs."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import edgekd
from edgekd.api import execute, open_job
from edgekd.pipeline import fingerprint
from edgekd.pipeline import fingerprint as dependencies
from edgekd.pipeline.fingerprint import PLUMBING, code_of, files_of, module_file
from edgekd.stages import STAGES

ROOT = Path(edgekd.__file__).parent
VALUES = "edgekd.config"
"""What a section's properties give is in the fingerprint by its value."""

PIPELINE = """\
name: n
data: {source: digits, augment: [{shift: {pixels: 1}}]}
teacher: {model: convnet-s, train: {epochs: 4, batch_size: 64, learning_rate: 1e-2}}
student: {model: teacher, prune: {ratio: 0.25}}
distill: {epochs: 1, batch_size: 256, losses: [{soft_labels: {}}, {fitnets: {student: head,
  teacher: head}}, {hard_labels: {}}]}
quantize: {int8: static}
benchmark: {min_queries: 20, max_seconds: 1}
gate: {accuracy: {min: 0.01}, evidence: measured-on-host}
"""


def stage_code() -> dict[str, set[str]]:
    return {stage.name: set(code_of((type(stage).__module__,))) for stage in STAGES}


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The modules of edgekd of which a function runs while a stage does, by stage."""
    ran: dict[str, set[str]] = {}
    for stage in STAGES:
        monkeypatch.setattr(type(stage), "run", _recording(type(stage).run, stage.name, ran))
    return ran


def _recording(run: Any, name: str, ran: dict[str, set[str]]) -> Any:
    modules = ran.setdefault(name, set())
    prefix = str(ROOT)
    seen: set[CodeType] = set()

    def record(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_code in seen:
            return
        seen.add(frame.f_code)
        # A class body and a module run when they are imported, whoever imports them.
        function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if function and frame.f_code.co_filename.startswith(prefix):
            path = Path(frame.f_code.co_filename)
            if path.suffix == ".py":
                modules.add(frame.f_globals["__name__"])

    def recorded(self: Any, *arguments: Any) -> None:
        sys.setprofile(record)
        try:
            run(self, *arguments)
        finally:
            sys.setprofile(None)

    return recorded


def test_every_module_that_a_stage_runs_is_one_that_it_depends_on(
    executed: dict[str, set[str]], tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(PIPELINE)
    outcome = execute(open_job(tmp_path / "p.yaml"), tmp_path / "run")
    assert outcome.ran == [stage.name for stage in STAGES]
    known = stage_code()
    for stage, modules in executed.items():
        unknown = {
            module
            for module in modules - known[stage]
            if not any(f"{module}.".startswith(f"{name}.") for name in (*PLUMBING, VALUES))
        }
        assert len(modules) > 2
        assert not unknown, f"stage {stage} runs code that is not in its fingerprint"


def test_a_stage_does_not_depend_on_what_it_only_shares_a_file_with() -> None:
    code = stage_code()
    training = "edgekd.distill.trainer"
    assert {stage for stage, modules in code.items() if training in modules} == {
        "teacher", "student", "distill", "quantize"
    }  # fmt: skip
    assert not {"edgerun.bench", "edgerun.timing", "edgerun.onnx_session"} & set(code["gate"])
    assert "edgerun.bench" not in code["teacher"]
    assert {m for m in code["gate"] if not m.startswith("edgekd.release")} <= {
        "edgekd.measurement", "edgekd.stages.task_data", "edgekd.stages.gate",
        # How a result file is read, and which percentiles it has.
        "edgerun.errors", "edgerun.files", "edgerun.percentiles",
    }  # fmt: skip
    assert "edgerun.bench" in code["benchmark"]
    for stage in STAGES:
        assert type(stage).__module__ in code[stage.name]


def test_no_stage_depends_on_plumbing_or_lists_its_code() -> None:
    for modules in stage_code().values():
        assert not [m for m in modules if any(f"{m}.".startswith(f"{n}.") for n in PLUMBING)]
    assert not [stage.name for stage in STAGES if hasattr(stage, "code")]


def test_the_report_depends_on_its_template() -> None:
    assert [file.name for file in files_of("edgekd.release.report")][1:] == ["report.html.jinja"]


def test_the_file_of_a_module_is_the_one_that_python_imports() -> None:
    for modules in stage_code().values():
        for module in modules:
            file = importlib.import_module(module).__file__
            assert file is not None
            assert module_file(module) == Path(file).resolve()


SOURCES = {
    "a": "from edgekd.b import used\nVALUE = used()\ndef lazy():\n    from edgekd.c import deep\n",
    "b": "import edgekd.d\nfrom edgekd.e import other\n"
    "def used():\n    return edgekd.d.x\ndef unused():\n    return other\n",
    "c": "from edgekd import pack\ndef deep():\n    return pack.name, 'edgekd.f:run'\n",
    "d": "x = 1",
    "e": "other = 1",
    "f": "def run(): ...",
    "g": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from edgekd.e import other\n"
    "def typed(value: other) -> other: ...\n",
    "h": "from edgekd.i import TABLE\ndef take(): return TABLE\n",
    "i": "from edgekd.e import other\nTABLE = {}\nTABLE['other'] = other\n",
    "pack/__init__": "from .inner import name\nimport pkgutil\n",
    "pack/inner": "name = 1",
    "pack/found": "from ..e import other\nx = other",
}


@pytest.fixture
def sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    for name, text in SOURCES.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(dependencies, "ROOTS", {"edgekd": tmp_path})
    monkeypatch.setattr(fingerprint, "ROOTS", {"edgekd": tmp_path})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """A process caches what it has read; a test that edits files runs several processes."""
    for cached in (dependencies.module_file, dependencies._read, dependencies._reached):
        cached.cache_clear()
    fingerprint.code_sha256.cache_clear()
    fingerprint.all_code_sha256.cache_clear()


@pytest.mark.parametrize(
    ("start", "reached"),
    [
        ("a", "a b c d e f pack pack.found pack.inner"),
        ("b", "b d e"),
        ("g", "g"),
        ("h", "h i e"),
        ("pack", "pack pack.found pack.inner e"),
    ],
)
def test_names_are_followed_to_what_they_use(sources: Path, start: str, reached: str) -> None:
    assert set(code_of((f"edgekd.{start}",))) == {f"edgekd.{name}" for name in reached.split()}


def test_an_edit_changes_the_hash_of_what_depends_on_it_alone(
    sources: Path,
) -> None:
    def hashes() -> dict[str, str]:
        forget()
        return {name: fingerprint.code_sha256((f"edgekd.{name}",)) for name in "abdgh"}

    before = hashes()
    # Another process finds them in the cache, and one that finds it damaged reads the code.
    assert hashes() == before
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "edgekd" / "code.json"
    for damage in ("{", "[]", '{"state": 1}'):
        assert cache.is_file()
        cache.write_text(damage)
        assert hashes() == before
    (sources / "e.py").write_text("other = 2")
    changed = {name for name, value in hashes().items() if value != before[name]}
    assert changed == {"a", "b", "h"}


def test_a_name_brings_what_its_definition_uses_and_no_more(sources: Path) -> None:
    assert "edgekd.e" not in set(code_of(("edgekd.d",)))
    waiting = dependencies._next("edgekd.b", "used")
    assert {module for module, _ in waiting} == {"edgekd.d"}


def test_a_distribution_that_is_not_installed_has_no_version() -> None:
    """What needs it reports that before the first stage; a fingerprint is no place to fail."""
    assert set(fingerprint.library_versions(("numpy", "no-such-distribution"))) == {"numpy"}
