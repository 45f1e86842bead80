"""The pages: references as the code gives them, valid pipelines, links that lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgekd.config.budgets import GateConfig
from edgekd.config.pipeline import PipelineConfig, load_pipeline, pipeline_schema
from edgekd.config.profile import load_profile
from edgekd.config.yaml_source import read_yaml
from edgekd.errors import InputError
from tests.docs.blocks import PAGES, ROOT, Block, blocks

SHIPPED = sorted((ROOT / "pipelines").glob("*.yaml"))
BASE: dict[str, Any] = {
    "name": "base",
    "data": {"source": "digits"},
    "teacher": {"model": "convnet-m", "train": {}},
    "student": {"model": "convnet-s"},
}
"""What a fragment of a pipeline is a part of."""

YAML = [block for block in blocks("yaml") if not block.left_out]


def title(block: Block) -> str:
    return f"{block.page}:{block.line}"


def complete(block: Block, folder: Path) -> Path | None:
    """The pipeline file of a block, completed if it is a fragment; None of a profile."""
    path = folder / (block.file or "pipeline.yaml")
    path.write_text(block.text)
    content = read_yaml(path).content
    if "kind" in content:
        return None
    if "name" not in content:
        path.write_text(yaml.safe_dump(BASE | content, sort_keys=False))
    return path


@pytest.mark.parametrize("block", YAML, ids=title)
def test_every_pipeline_and_profile_is_valid(block: Block, tmp_path: Path) -> None:
    path = complete(block, tmp_path)
    if path is None:
        load_profile(str(tmp_path / str(block.file)))
    else:
        load_pipeline(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_takes_the_shipped_pipelines(path: Path) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(pipeline_schema())
    assert not [error.message for error in validator.iter_errors(read_yaml(path).content)]


@pytest.mark.parametrize("block", YAML, ids=title)
def test_the_schema_takes_the_pipelines_of_the_pages(block: Block, tmp_path: Path) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(pipeline_schema())
    path = complete(block, tmp_path)
    if path is not None:
        assert not [error.message for error in validator.iter_errors(read_yaml(path).content)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"distill": {"epoch": 3}},
        {"distill": {"losses": [{"soft_labels": {}, "wsld": {}, "weight": 1}]}},
        {"distill": {"cache": True}},
        {"engines": [3]},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_loader_refuses(wrong: dict[str, Any], tmp_path: Path) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(pipeline_schema())
    assert not validator.is_valid(BASE | wrong)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(BASE | wrong))
    with pytest.raises(InputError, match=r"wrong\.yaml"):
        load_pipeline(tmp_path / "wrong.yaml")


def test_every_key_is_described() -> None:
    def undescribed(schema: dict[str, Any]) -> list[str]:
        parts = {"pipeline": schema, **schema["$defs"]}
        return [
            f"{name}.{key}"
            for name, part in parts.items()
            for key, about in part.get("properties", {}).items()
            if not about.get("description")
        ]

    assert undescribed(PipelineConfig.model_json_schema()) == []


def test_the_gate_page_names_every_budget() -> None:
    page = (ROOT / "docs/gate.md").read_text()
    for section, field in GateConfig.model_fields.items():
        for budget in getattr(field.annotation, "model_fields", {}):
            named = f"`{section}.{budget}`" in page or budget in ("p90_ms", "p95_ms", "p99_ms")
            assert named, f"{section}.{budget}"


@pytest.mark.parametrize("name", ["pipeline.md", "cli.md", "losses.md", "devices.md"])
def test_the_reference_is_that_of_the_code(name: str, generated: Path) -> None:
    written = (ROOT / "docs/reference" / name).read_text()
    assert written == (generated / name).read_text(), "run make docs"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run([sys.executable, ROOT / "docs/generate.py", folder], check=True, cwd=ROOT)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)
    named = re.findall(r"`((?:examples|tests|docs|pipelines|edgekd)/[\w./-]+)`", text)
    lacking = [link for link in links if not (ROOT / page.parent / link).exists()]
    lacking += [path for path in named if not (ROOT / path).exists()]
    assert not lacking


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "python" / "index.html").read_text()
    assert 'id="edgekd.api.load_result"' in page


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
