"""Candidates: all combinations, each network once, a spread of sizes where there are too many."""

from __future__ import annotations

from typing import Any

import pytest

from edgekd.config.networks import StudentConfig, TeacherConfig
from edgekd.config.search import SearchConfig
from edgekd.errors import InputError
from edgekd.models import build_model
from edgekd.spec import TensorSpec
from edgekd.students.candidates import Candidate, propose

IMAGE = TensorSpec("image", ("batch", 1, 16, 24))
LOGITS = TensorSpec("logits", ("batch", 7))
TEACHER = TeacherConfig.model_validate({"model": "convnet-l", "train": {}})
PRUNED = {"prune": {"ratio": [0.25, 0.5]}}
CONVNETS = {"model": "convnet-s", "grid": {"widths": [[8, 16, 32], [16, 32, 64]], "blocks": [0, 1]}}


def proposed(
    *sources: dict[str, Any], inputs: Any = (IMAGE,), onnx: bool = False, **settings: Any
) -> tuple[tuple[Candidate, ...], str]:
    """The candidates, and what was said."""
    search = {"candidates": list(sources) or None, **settings}
    network = None if onnx else build_model(TEACHER, (IMAGE,), (LOGITS,))
    said: list[str] = []
    found = propose(
        SearchConfig.model_validate(search), TEACHER, network, inputs, (LOGITS,), said.append
    )
    return found, "\n".join(said)


def test_all_combinations_with_readable_names() -> None:
    deep = {
        "drop_layers": {"keep": [0.5, 1]},
        "prune": {"ratio": 0.5, "importance": ["lamp", "taylor"]},
    }
    found, _ = proposed(PRUNED, deep, {**CONVNETS, "resolution": [12, [8, 16]]})
    assert [c.name for c in found[:7]] == [
        "teacher pruned 0.25",
        "teacher pruned 0.5",
        "teacher depth 0.5 pruned 0.5 lamp",
        "teacher depth 0.5 pruned 0.5 taylor",
        "teacher depth 1 pruned 0.5 lamp",
        "teacher depth 1 pruned 0.5 taylor",
        "convnet-s widths=8-16-32 blocks=0 12px",
    ]
    assert found[-1].name == "convnet-s widths=16-32-64 blocks=1 8x16px"
    assert [c.origin for c in found] == ["prune"] * 6 + ["family"] * 8
    assert found[2].parameters < found[1].parameters < found[0].parameters
    assert found[6].where == "student.search.candidates[2]"


def test_each_is_a_section_that_can_be_copied() -> None:
    for candidate in proposed(PRUNED, CONVNETS)[0]:
        written = candidate.student.model_dump(mode="json", exclude_defaults=True)
        assert StudentConfig.model_validate(written) == candidate.student


def test_the_same_network_is_proposed_once() -> None:
    # The arguments are convnet-s's own; the image's shorter side is 16; half of three is two.
    own = {"model": "convnet-s", "args": {"widths": [16, 24, 48]}, "resolution": 16}
    found, said = proposed(
        {"model": "convnet-s"}, own, {"drop_layers": {"keep": [0.5, 2]}}, PRUNED, PRUNED
    )
    assert [c.name for c in found] == [
        "convnet-s", "teacher depth 0.5", "teacher pruned 0.25", "teacher pruned 0.5"
    ]  # fmt: skip
    assert "convnet-s 16px is left out: it is the same network as convnet-s" in said
    assert "teacher depth 2 is left out: it is the same network as teacher depth 0.5" in said


def test_too_many_are_spread_evenly_by_size() -> None:
    widths = [[8 * n, 8 * n, 8 * n] for n in (5, 1, 4, 2, 3)]
    grid = {"model": "convnet-s", "grid": {"widths": widths, "blocks": [0]}}
    found, said = proposed(grid, max_candidates=3)
    assert [c.student.args["widths"][0] for c in found] == [40, 8, 24]
    assert "5 candidates, of which 3" in said
    assert found == proposed(grid, max_candidates=3)[0]


def test_what_cannot_be_built_is_left_out_with_the_reason() -> None:
    found, said = proposed(PRUNED, {"model": "convnet-s", "resolution": [4, 12]})
    assert len(found) == 3
    assert "convnet-s 4px is left out: the image is 4×6" in said
    with pytest.raises(InputError, match="needs at least 8×8"):
        proposed({"model": "convnet-s", "resolution": [4, 5]})
    with pytest.raises(InputError, match=r"1 candidate, convnet-s 12px, and there is nothing"):
        proposed({"model": "convnet-s", "resolution": [4, 12]})


def test_an_onnx_teacher_cannot_be_made_smaller() -> None:
    with pytest.raises(InputError, match="ONNX file"):
        proposed(PRUNED, onnx=True)
    found, _ = proposed(onnx=True)
    assert {c.student.model for c in found} == {"convnet-s", "mobilenet"}


@pytest.mark.parametrize(
    ("inputs", "models"),
    [
        ((IMAGE,), {"teacher", "convnet-s", "mobilenet"}),
        ((IMAGE, TensorSpec("state", ("batch", 5))), {"teacher", "policy-s"}),
        ((TensorSpec("x", ("batch", 5)),), {"teacher", "mlp"}),
        ((TensorSpec("signal", ("batch", 2, 64)),), {"teacher", "mlp", "transformer"}),
    ],
)
def test_without_a_list_the_data_decide(inputs: Any, models: set[str]) -> None:
    found, _ = proposed(inputs=inputs)
    assert {c.student.model for c in found} == models
    names = [c.name for c in found]
    assert {"teacher pruned 0.875", "teacher depth 0.5"} <= set(names)
    assert len(set(names)) == len(names) <= 24
