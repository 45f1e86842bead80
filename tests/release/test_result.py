"""A result is validated when it is read, and written as it was."""

import json

import pytest

from edgekd.errors import InputError
from edgekd.release.result import Result, read_result, recipe_sha256
from tests.command_line import edgekd
from tests.release.conftest import bare_result


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda r: r.update(schema="other/1"), "schema"),
        (lambda r: r["models"].pop("student"), "models.student"),
        (lambda r: r.pop("comparison"), "comparison"),
        (lambda r: r["models"]["student"].pop("metric"), "models.student.metric"),
        (lambda r: r["models"]["student"]["metric"].update(value=float("nan")), "finite"),
        (lambda r: r["models"]["student"]["metric"].update(interval=[2, 1]), "turned"),
        (lambda r: r["models"]["student"]["metric"].update(interval=[2]), "two ends"),
        (lambda r: r["models"]["student"]["metric"].update(evidence="guessed"), "evidence"),
        (lambda r: r["models"]["student"]["metric"].update(extra=1), "not a figure"),
        (lambda r: r.update(task=[]), "task"),
    ],
)
def test_a_damaged_result_is_named(result, damage, word, tmp_path):
    damage(result)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match=word):
        read_result(path)


@pytest.mark.parametrize(
    ("part", "change", "where"),
    [
        ("latency.p95_ms", {"value": 9999.0}, "p95_ms is 9999, outside its interval"),
        ("latency.p95_ms", {"n": 1, "interval": None}, "p95_ms has no interval"),
        ("latency.p95_ms", {"n": 2999}, "p95_ms.n is 2999, and samples_ms has 3000"),
        ("latency.p95_ms", {"value": -1.0, "interval": [-2.0, 1.0]}, "p95_ms is -1, which is not"),
        ("latency.p95_ms", {"unit": "s"}, "p95_ms.unit is 's', not 'ms'"),
        ("latency.p95_ms", {"value": 0.02, "interval": [0.01, 0.05]}, "and that of samples_ms"),
        ("latency.p95_ms", {"value": True}, "p95_ms.value is True"),
        ("latency.p95_ms", {"value": None}, "p95_ms has an interval and no value"),
        ("latency.p95_ms", {"n": -1}, "p95_ms.n is -1"),
        ("metric", {"value": 5.0, "interval": [4.9, 5.1]}, "metric is 5, which is not from 0 to 1"),
        ("metric", {"n": 0}, "metric.n is 0, and it has a value"),
        ("metric", {"confidence": 95}, "metric.confidence is 95"),
        ("size_mb", {"value": -0.1}, "size_mb is -0.1"),
        ("size_mb", {"unit": "KB"}, "size_mb.unit is 'KB', not 'MB'"),
        ("samples_ms", [0.03, -0.01], "samples_ms.1 is -0.01"),
        ("samples_ms", ["0.03"], "samples_ms.0 is '0.03'"),
        ("samples_ms", 3, "samples_ms is 3"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(result, part, change, where, tmp_path):
    owner = result["models"]["student"]
    *parents, last = part.split(".")
    for parent in parents:
        owner = owner[parent]
    if isinstance(change, dict):
        owner[last].update(change)
    else:
        owner[last] = change
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    (tmp_path / "budget.yaml").write_text("latency: {p95_ms: 50}\n")
    done = edgekd("gate", path, "--budget", tmp_path / "budget.yaml", code=2)
    assert f"models.student.{part if 'samples' in part else part.partition('.')[0]}" in done.output
    assert where in " ".join(done.output.split())
    assert str(path) in done.output


def test_a_comparison_out_of_its_range_is_refused(result):
    result["comparison"]["speedup"].update(value=-3.0)
    with pytest.raises(InputError, match=r"comparison\.speedup is -3"):
        Result.from_json(result)


def test_a_result_is_written_as_it_was_read(result):
    result = json.loads(json.dumps(result))
    assert Result.from_json(result).to_json() == result
    # The first results had neither a recipe nor a seed nor the files' hashes.
    first = bare_result()
    assert Result.from_json(first).to_json() == first


def test_missing_and_broken_result_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_result(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"schema": ')
    with pytest.raises(InputError, match="JSON"):
        read_result(tmp_path / "cut.json")
    for content in ("[]", "[" * 100_000, f'{{"schema": {"9" * 5000}}}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(InputError):
            read_result(tmp_path / "other.json")


def test_recipe_is_the_same_for_all_seeds_and_names():
    one = {"name": "a", "seed": 0, "student": {"model": "m"}}
    assert recipe_sha256(one) == recipe_sha256({**one, "name": "b", "seed": 3})
    assert recipe_sha256(one) != recipe_sha256({**one, "student": {"model": "n"}})


def test_result_knows_its_optional_parts(result):
    del result["models"]["baseline"], result["comparison"]["gap_closed"]
    parsed = Result.from_json(result)
    assert "baseline" not in parsed.models
    assert parsed.student.latency["p95_ms"].unit == "ms"
