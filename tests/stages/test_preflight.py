"""What is refused before anything is loaded or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import load_profile
from edgekd.errors import InputError
from edgekd.pipeline.stage import Job
from edgekd.stages import preflight


def job(folder: Path, **changes: Any) -> Job:
    values = {
        "name": "n",
        "data": {"source": "digits"},
        "teacher": {"model": "mlp", "train": {}},
        "student": {"model": "convnet-xs"},
    }
    return Job(PipelineConfig.model_validate(values | changes), folder, load_profile("host"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"student": {"model": "mlp", "args": {"hiden": [4]}}},
            "'hiden'[^?]*student.args[^?]*hidden",
        ),
        ({"student": {"model": "mlp", "args": {"hidden": "four"}}}, "student.args"),
        ({"teacher": {"model": "mlp", "args": {"dropuot": 0.1}, "train": {}}}, "teacher.args"),
        ({"student": {"model": "convnet-xl"}}, "student.model"),
    ],
)
def test_a_wrong_network_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    preflight(job(tmp_path), gated=False)
    with pytest.raises(InputError, match=says):
        preflight(job(tmp_path, **changes), gated=False)


def test_what_a_constructor_is_given_by_the_project_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "constructed.py").write_text(
        "from torch import nn\n\n\n"
        "def small(num_classes, width: int = 4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    from edgekd.extension import searching

    with searching(tmp_path):
        own = {"model": "constructed:small"}
        preflight(job(tmp_path, student=own), gated=False)
        with pytest.raises(InputError, match="no argument 'wdith'"):
            preflight(job(tmp_path, student={**own, "args": {"wdith": 3}}), gated=False)


@pytest.mark.parametrize(
    ("candidates", "says"),
    [
        ([{"model": "mlp", "grid": {"hiden": [[4], [8]]}}], r"'hiden'[\s\S]*candidates\[0\].args"),
        ([{"prune": {"ratio": 0.5}}, {"model": "mlq"}], r"'mlq'[\s\S]*candidates\[1\].model"),
        ([{"model": "mlp", "grid": {"hidden": [[4], "x"]}}], r"'x'[\s\S]*candidates\[0\].args"),
    ],
)
def test_a_searchs_networks_are_checked(tmp_path: Path, candidates: list[Any], says: str) -> None:
    preflight(job(tmp_path, student={"search": {}}), gated=False)
    with pytest.raises(InputError, match=says):
        preflight(job(tmp_path, student={"search": {"candidates": candidates}}), gated=False)
