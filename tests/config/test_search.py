"""What the sections ``student`` and ``student.search`` refuse, and what they understand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgekd.config.networks import StudentConfig
from edgekd.config.pipeline import load_pipeline
from edgekd.config.search import SearchConfig
from edgekd.errors import InputError

MLPS = {"model": "mlp", "grid": {"hidden": [[8], [16]]}}
LARGE = {"model": "mlp", "grid": {key: [*range(11)] for key in "abc"}}
PRUNED = {"prune": {"ratio": 0.5}}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "no network is named"),
        ({"search": {}, "model": "mlp", "resolution": 8}, "remove 'model', 'resolution'"),
        ({"model": "teacher", "prune": {}}, "removes nothing"),
        ({"model": "teacher", "prune": {"ratios": {"a": 0}}}, "removes nothing"),
        ({"model": "teacher", "prune": {"ratios": {"a": 1.5}}}, "less than 1"),
        ({"model": "teacher", "drop_layers": {"keep": 1.0}}, "share between 0 and 1 or a number"),
        ({"model": "teacher", "drop_layers": {"keep": 0}}, "share between 0 and 1 or a number"),
        ({"model": "mlp", "resolution": [4]}, "height and width"),
        ({"model": "mlp", "resolution": True}, "height and width"),
        ({"search": {"candidates": []}}, "the list is empty"),
        ({"search": {"candidates": [PRUNED]}}, "nothing to choose: write it as 'student: …'"),
        ({"search": {"candidates": [{**PRUNED, "grid": {"a": [1]}}]}}, "add 'model: …'"),
        ({"search": {"candidates": [{"model": "mlp", **PRUNED}]}}, "chooses by trained weights"),
        ({"search": {"candidates": [{}, PRUNED]}}, "the teacher unchanged"),
        ({"search": {"candidates": [{**MLPS, "args": {"hidden": [4]}}]}}, "in args and in grid"),
        ({"search": {"candidates": [{"model": "mlp", "grid": {"hidden": []}}]}}, "no values"),
        ({"search": {"candidates": [{"prune": {"ratio": []}}]}}, "the list is empty"),
        ({"search": {"candidates": [{"prune": {"ratio": [0.5, 1]}}]}}, "less than 1"),
        ({"search": {"candidates": [LARGE]}}, "1,331 combinations"),
        ({"search": {"reduction": 1}}, "greater than or equal to 2"),
        ({"search": {"objectives": ["accuracy", "size", "size"]}}, "'size' is named twice"),
        ({"search": {"objectives": ["latency"]}}, "add accuracy"),
        ({"search": {"objectives": ["accuracy", "speed"]}}, "'latency', 'memory' or 'size'"),
        ({"search": {"margin": 1}}, "less than 1"),
        ({"search": {"max_candidates": 1}}, "greater than or equal to 2"),
    ],
)  # fmt: skip
def test_a_wrong_section_is_refused(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StudentConfig.model_validate(section)
    (problem,) = caught.value.errors()
    assert says in problem["msg"]


def test_the_error_names_line_and_key(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: p\ndata: {source: digits}\nteacher: {model: mlp, train: {}}\n"
        "student:\n  search:\n    candidates:\n      - prune: {ratio: [0.5, 0.25]}\n"
        "        drop_layers: {keep: [0.5, 0]}\n"
    )
    with pytest.raises(InputError, match=r"drop_layers.keep.1: it is a share[\s\S]*:8"):
        load_pipeline(path)


def test_one_value_is_a_list_of_one() -> None:
    smaller = {"prune": {"ratio": 0.5}, "drop_layers": {"keep": 3}, "resolution": 20}
    search = SearchConfig.model_validate({"candidates": [smaller, MLPS]})
    made, mlps = search.candidates
    assert (made.prune.ratio, made.drop_layers.keep, made.resolution) == ((0.5,), (3,), (20,))
    assert (made.count, mlps.count) == (1, 2)


def test_the_last_rung_is_a_quarter_of_the_training_at_least_two() -> None:
    assert SearchConfig().last_epochs(40) == 10
    assert SearchConfig().last_epochs(5) == 2
    assert SearchConfig(epochs=3).last_epochs(40) == 3
