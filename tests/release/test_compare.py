"""Results side by side and over seeds."""

import copy
import json

import pytest

from edgekd.errors import InputError
from edgekd.release.compare import compare, compare_files
from edgekd.release.result import Result


def with_seed(result, seed, accuracy):
    other = copy.deepcopy(result)
    other["seed"] = seed
    other["models"]["student"]["metric"]["value"] = accuracy
    other["models"]["student"]["metric"]["interval"] = None
    return Result.from_json(other)


def test_mean_over_the_seeds_of_one_pipeline(result):
    results = [with_seed(result, seed, a) for seed, a in ((0, 0.90), (1, 0.92), (2, 0.94))]
    (means,) = compare(["a", "b", "c"], results).seed_means
    row = next(row for row in means.rows if row.label == "accuracy, student distilled")
    assert row.figures[0].value == pytest.approx(0.92)
    # t(0.975, 2) = 4.302653, s = 0.02.
    half = 4.302653 * 0.02 / 3**0.5
    assert row.figures[0].interval == pytest.approx((0.92 - half, 0.92 + half), rel=1e-6)
    assert means.seeds == (0, 1, 2)


def test_other_pipelines_and_repeated_seeds_are_not_averaged(result):
    other = copy.deepcopy(result)
    other["recipe"] = "b" * 64
    other["seed"] = 1
    pair = [Result.from_json(result), Result.from_json(other)]
    assert compare(["a", "b"], pair).seed_means == ()
    twice = compare(["a", "b"], [Result.from_json(result), Result.from_json(result)])
    assert twice.seed_means == ()
    assert "twice" in twice.notes[0]


def test_a_seed_without_a_gap_is_counted(result):
    results = [with_seed(result, seed, 0.9) for seed in (0, 1)]
    third = copy.deepcopy(result)
    third["seed"] = 2
    third["comparison"]["gap_closed"].update(value=None, interval=None)
    (means,) = compare(["a", "b", "c"], [*results, Result.from_json(third)]).seed_means
    gap = next(row for row in means.rows if row.label == "gap closed").figures[0]
    assert gap.n == 2
    assert "1 of 3" in gap.note


def test_run_folders_are_found_and_labelled_by_what_differs(result, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "benchmark").mkdir(parents=True)
        (tmp_path / name / "benchmark" / "result.json").write_text(json.dumps(result))
    found = compare_files([tmp_path / "one", tmp_path / "two" / "benchmark" / "result.json"])
    assert len(found.labels) == 2
    assert compare_files([tmp_path / "one", tmp_path / "two"]).labels == ("one", "two")
    with pytest.raises(InputError, match="no result"):
        compare_files([tmp_path])
