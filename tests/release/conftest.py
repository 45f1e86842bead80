"""A result, histories and a pipeline such as the stages write, for all tests of the release."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from edgekd.measurement import Measurement
from edgekd.release.result import SCHEMA


def figure(value, unit, n=1, interval=None, evidence="measured-on-target", note=""):
    return Measurement(value, unit, n, interval, 0.95, evidence, note).to_json()


def latency(samples):
    return {
        f"p{p}_ms": figure(
            float(np.quantile(samples, p / 100)),
            "ms",
            len(samples),
            tuple(map(float, np.quantile(samples, [p / 100 - 0.005, p / 100 + 0.005]))),
        )
        for p in (50, 90, 95, 99)
    }


def timed(file, metric, size, parameters, median, spread, seed):
    rng = np.random.default_rng(seed)
    samples = median * (1 + spread * rng.gamma(2.0, 1.0, 3000))
    return {
        "file": file,
        "metric": metric,
        "size_mb": figure(size, "MB"),
        "parameters": figure(float(parameters), "parameters"),
        "latency": latency(samples),
        "peak_memory_mb": figure(8.4, "MB", note="above an empty process"),
        "samples_ms": samples.tolist(),
        "warmup": {"queries": 400, "windows": 4, "steady": True},
        "runtime": {
            "providers": {
                "requested": ["CPUExecutionProvider"],
                "session": ["CPUExecutionProvider"],
                "nodes": {"CPUExecutionProvider": 12},
            },
            "threads": 1,
        },
    }


def make_result():
    accuracy = lambda v, lo, hi: figure(v, "accuracy", 10000, (lo, hi))  # noqa: E731
    return {
        "schema": SCHEMA,
        "name": "fashion-mnist",
        "seed": 0,
        "recipe": "a" * 64,
        "profile": "host",
        "target": "local",
        "evidence": "measured-on-target",
        "task": {"name": "classification", "metric": "accuracy", "higher_is_better": True},
        "models": {
            "teacher": timed(
                "teacher.onnx", accuracy(0.9386, 0.9337, 0.9431), 1.96, 487_290, 0.327, 0.03, 1
            ),
            "baseline": {
                "file": "baseline.onnx",
                "metric": accuracy(0.9142, 0.9085, 0.9195),
                "size_mb": figure(0.147, "MB"),
                "parameters": figure(35_018.0, "parameters"),
            },
            "student": timed(
                "student.onnx", accuracy(0.9251, 0.9198, 0.9301), 0.147, 35_018, 0.033, 0.08, 2
            ),
        },
        "comparison": {
            "drop": figure(0.0135, "points", 10000, (0.0088, 0.0182)),
            "speedup": figure(9.81, "×", 120, (9.7, 9.93)),
            "size_ratio": figure(13.33, "×"),
            "parameter_ratio": figure(0.0719, "×"),
            "gap_closed": figure(0.447, "of the gap", 10000, (0.286, 0.611)),
            "baseline_gain": figure(0.0109, "points", 10000, (0.0059, 0.0159)),
        },
        "environment": {
            "device": None,
            "os": "Debian GNU/Linux 12 (bookworm)",
            "cpu": "AMD EPYC",
            "cpus": 2,
            "memory_mb": 25276.514304,
            "versions": {"numpy": "2.4.6", "onnxruntime": "1.31.1"},
            "virtual_machine": True,
            "governor": None,
            "before": {"clocks_mhz": [2445.4, 2445.4], "throttling": None, "load_1m": 0.4},
            "after": {"clocks_mhz": [2445.4, 2445.4], "throttling": None, "load_1m": 1.1},
        },
        "versions": {"edgekd": "0.1.0", "torch": "2.9.0", "onnxruntime": "1.31.1"},
        "fingerprints": {"data": "0" * 64, "teacher": "1" * 64},
    }


def bare_result():
    """The least that a result may have, such as the first ones had."""
    figure = {"value": 0.0, "unit": "points", "n": 100, "interval": None, "confidence": 0.95,
              "evidence": "measured-on-target", "note": ""}  # fmt: skip
    return {
        "schema": SCHEMA, "name": "x", "profile": "host", "target": "local",
        "evidence": "measured-on-target",
        "task": {"name": "classification", "metric": "accuracy", "higher_is_better": True},
        "models": {"student": {"file": "s.onnx", "metric": {**figure, "unit": "accuracy"}}},
        "comparison": {"drop": dict(figure)},
        "environment": {}, "versions": {}, "fingerprints": {},
    }  # fmt: skip


def make_history(epochs, level, terms, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        fall = math.exp(-epoch / 5)
        values = {name: (0.3 + fall) * (k + 1) for k, name in enumerate(terms)}
        rows.append(
            {
                "epoch": epoch,
                "loss": sum(values.values()),
                "terms": values,
                "validation": level - 0.12 * fall + 0.002 * float(rng.normal()),
                "learning_rate": 1e-3,
                "seconds": 20.0,
                "samples_per_second": 2700.0,
            }
        )
    best = max(rows, key=lambda row: row["validation"])["epoch"]
    return {"metric": "accuracy", "higher_is_better": True, "epochs": rows, "best_epoch": best}


@pytest.fixture
def result():
    return copy.deepcopy(make_result())


@pytest.fixture
def histories():
    return {
        "teacher": make_history(12, 0.94, ["hard_labels"], 0),
        "baseline": make_history(20, 0.915, ["hard_labels"], 1),
        "student": make_history(20, 0.926, ["hard_labels", "soft_labels"], 2),
    }


@pytest.fixture
def pipeline():
    return {
        "name": "fashion-mnist",
        "data": {"source": "fashion-mnist"},
        "teacher": {"model": "convnet-l", "train": {"epochs": 12}},
        "student": {"model": "convnet-s"},
        "gate": {"accuracy": {"max_drop": 0.02}, "latency": {"p95_ms": 2.0}},
    }
