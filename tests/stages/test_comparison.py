"""Likely causes of a distillation that did not help, from measured facts."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml

from edgekd.config.pipeline import PipelineConfig
from edgekd.distill.checkpoint import Epoch, History
from edgekd.release.statistics import paired_difference
from edgekd.stages.comparison import Facts, causes

PIPELINE: dict[str, Any] = {
    "name": "n",
    "data": {"source": "digits"},
    "teacher": {"model": "convnet-l", "train": {"epochs": 5}},
    "student": {"model": "convnet-xs"},
}


def config(**distill: Any) -> PipelineConfig:
    return PipelineConfig.model_validate(PIPELINE | {"distill": distill})


def history(*validation: float) -> History:
    found = History("accuracy", True)
    for number, value in enumerate(validation, start=1):
        found.add(Epoch(number, 1.0, {}, value, 0.1, 1.0, 1.0))
    return found


def right(share: float, n: int = 1000) -> np.ndarray:
    return (np.arange(n) < share * n).astype(float)


FLAT = history(*[0.9] * 10)
# A good teacher and a student that follows it: no cause but the number of samples.
FACTS = Facts(
    gain=paired_difference(right(0.9), right(0.905)),
    teacher_gap=paired_difference(right(0.99), right(0.905)),
    history=FLAT,
    deviation=0.01,
    agreement=0.97,
    parameter_ratio=5.0,
    teacher_training=0.99,
    entropy={1.0: 0.02, 2.0: 0.1, 4.0: 0.4, 8.0: 0.7},
    images=True,
)


def found(facts: Facts, pipeline: PipelineConfig) -> dict[str, str]:
    rows = list(causes(facts, pipeline))
    for row in rows:
        # What is to be tried is a part of a pipeline.
        changed = yaml.safe_load(row["try"])
        assert isinstance(changed, dict)
        (section,) = changed
        PipelineConfig.model_validate(
            pipeline.model_dump(mode="json", exclude_defaults=True)
            | {section: getattr(pipeline, section).model_dump(mode="json") | changed[section]}
        )
    return {row["cause"]: f"{row['evidence']}; {row['try']}" for row in rows}


def test_a_good_teacher_is_not_blamed() -> None:
    worse = replace(FACTS, gain=paired_difference(right(0.5), right(0.9)))
    assert found(worse, config()) == {}


@pytest.mark.parametrize(
    ("facts", "distill", "cause", "says"),
    [
        ({"teacher_gap": paired_difference(right(0.8), right(0.9))}, {}, "worse", "epochs: 10"),
        (
            {"teacher_gap": paired_difference(right(0.901), right(0.9))},
            {},
            "hardly better",
            "epochs: 10",
        ),
        (
            {"agreement": 0.7, "parameter_ratio": 40.0, "assistant": "convnet-s"},
            {},
            "too small",
            r"70\.0%.* 40 times.*assistant: {models: \[convnet-s\]}",
        ),
        ({"agreement": 0.7}, {}, "does not follow", "losses: auto"),
        (
            {},
            {"losses": [{"soft_labels": {"temperature": 1}, "weight": 0.5}, "hard_labels"]},
            "temperature is too low",
            r"2\.0%.*temperature: 4\.0}, weight: 0\.5}, {hard_labels: {}}",
        ),
        (
            {"entropy": {1.0: 0.35, 4.0: 0.95}},
            {},
            "temperature is too high",
            r"soft_labels: {temperature: 1\.0}, weight: 0\.9",
        ),
        ({"teacher_training": 1.0, "views": 1}, {}, "by heart", "shift"),
        (
            {"teacher_training": 1.0, "views": 1},
            {"augment": ["flip"], "cache": {"views": 1}},
            "by heart",
            "views: 8",
        ),
        ({"history": history(*[0.5] * 8, 0.6, 0.7)}, {}, "too few epochs", "epochs: 40"),
        (
            {"gain": paired_difference(np.roll(right(0.9), 9), right(0.905))},
            {},
            "too few validation samples",
            r"1,000 were compared; about \d[\d,]+ would",
        ),
        ({"uses_teacher": False}, {"losses": ["hard_labels"]}, "no loss", "soft_labels"),
    ],
)
def test_a_cause_is_named_with_figure_and_remedy(
    facts: dict[str, Any], distill: dict[str, Any], cause: str, says: str
) -> None:
    sure = replace(FACTS, gain=paired_difference(right(0.5), right(0.9)))
    rows = found(replace(sure, **facts), config(**distill))
    (name,) = rows
    assert cause in name
    assert re.search(says, rows[name]), rows[name]


def test_a_teacher_that_learnt_with_augmentation_is_no_suspect() -> None:
    sure = replace(FACTS, gain=paired_difference(right(0.5), right(0.9)), teacher_training=1.0)
    assert found(replace(sure, views=8), config()) == {}
