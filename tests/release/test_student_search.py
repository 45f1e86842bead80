"""The report's section of a search: nothing is left out, and names stay text."""

import copy

import pytest

from edgekd.release.student_search import search_section
from tests.release.test_report import Balanced, written


def around(value, share=0.1):
    return {"value": value, "low": value * (1 - share), "high": value * (1 + share)}


def candidate(name, status, latency, rungs=(), front=False, reason=""):
    measured = {
        "variant": "float32",
        "latency_ms": {"p50": around(latency), "p95": around(latency * 1.2)},
        "memory_mb": around(9.0),
        "size_mb": 0.12,
        "processes": 3,
    }
    return {
        "name": name,
        "origin": "family",
        "student": {"model": "convnet-s"},
        "parameters": 3822,
        "macs": 10_000,
        "predicted": {
            "latency_ms": {"p50": around(latency * 1.3, 0.4), "p95": around(latency * 1.5, 0.4)},
            "memory_mb": around(9.5),
            "size_mb": 0.12,
        },
        "measured": None if status in ("predicted-infeasible", "not-measured") else measured,
        "status": status,
        "reason": reason,
        "rungs": [
            {"epochs": epochs, "values": {"accuracy": value}, "seconds": 1.0}
            for epochs, value in rungs
        ],
        "front": front,
    }


@pytest.fixture
def search():
    return copy.deepcopy(
        {
            "schema": "edgekd/search/1",
            "metric": "accuracy",
            "higher_is_better": True,
            "limits": {"latency.p95_ms": {"limit": 0.3, "origin": "profile raspberry-pi-4"}},
            "margin": 0.1,
            "objectives": ["accuracy", "latency"],
            "candidates": [
                candidate("small", "dropped", 0.05, [(2, 0.81)]),
                candidate("middle", "finalist", 0.1, [(2, 0.84), (6, 0.86)], front=True),
                candidate("large", "winner", 0.2, [(2, 0.85), (6, 0.89)], front=True),
                candidate("slow", "infeasible", 0.5, reason="latency.p95_ms 0.6 ms above 0.3 ms"),
                candidate("huge", "predicted-infeasible", 5.0, reason="predicted 4 to 6 ms"),
            ],
            "winner": "large",
            "why": "large has the highest validation accuracy",
            "assistant": {"text": "an assistant may help"},
            "cost_model": {"latency_error": 0.2, "memory_error": 0.08, "measured": 4},
        }
    )


def test_every_candidate_is_in_the_page(tmp_path, result, histories, pipeline, search):
    page = written(tmp_path, result, histories, pipeline, {"search": search})
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    for entry in search["candidates"]:
        assert f"{entry['name']}" in page
        assert entry["reason"] in page
    for words in ("89.00 %", "0.24 ms (0.216 to 0.264)", "profile raspberry-pi-4", "20 % for lat",
                  "an assistant may help", "Predicted against measured memory"):  # fmt: skip
        assert words in page


def test_the_selected_one_is_first_and_the_front_is_joined(search):
    section = search_section(search)
    assert [row.name for row in section.rows] == ["large", "middle", "small", "slow", "huge"]
    assert section.percentile == "p95"
    assert section.rungs[0] == [2, 6]
    assert section.charts[0].count("<polyline") == 1
    assert section.charts[0].count("<circle") == 3 + 3  # and one in each key


def test_markup_in_candidates_stays_text(tmp_path, result, histories, pipeline, search):
    evil = '"><script>alert(1)</script>'
    for entry in search["candidates"]:
        entry["name"] = entry["reason"] = evil
    search["why"] = search["assistant"]["text"] = search["winner"] = evil
    page = written(tmp_path, result, histories, pipeline, {"search": search})
    assert "<script" not in page


def test_a_search_that_measured_nothing_is_shown(tmp_path, result, histories, pipeline, search):
    search["candidates"] = search["candidates"][-1:]
    search.update(assistant=None, limits={}, cost_model=None, objectives=["accuracy"])
    page = written(tmp_path, result, histories, pipeline, {"search": search})
    assert "huge" in page
    assert "Predicted against" not in page
