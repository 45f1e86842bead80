"""``distill.losses: auto`` and ``distill.keep`` as written in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from edgekd.config.pipeline import PipelineConfig, load_pipeline, pipeline_schema
from edgekd.config.recipes import recipe_text
from edgekd.errors import InputError

PIPELINE: dict[str, Any] = {
    "name": "n",
    "data": {"source": "digits"},
    "teacher": {"model": "mlp", "train": {}},
    "student": {"model": "convnet-xs"},
}

DEFAULT = "0.1 hard_labels + 0.9 soft_labels (temperature 4)"


def config(distill: Any, **changes: Any) -> PipelineConfig:
    return PipelineConfig.model_validate(PIPELINE | {"distill": distill} | changes)


@pytest.mark.parametrize("losses", ["auto", {"auto": None}, {"auto": {}}, {"auto": {"epochs": 3}}])
def test_the_default_terms_are_always_raced_first(losses: Any) -> None:
    names = [recipe_text(recipe) for recipe in config({"losses": losses}).recipes]
    assert names[0] == DEFAULT
    assert len(set(names)) == len(names) > 5
    jsonschema.validate(PIPELINE | {"distill": {"losses": losses}}, pipeline_schema())


def test_recipes_of_ones_own_are_raced_with_the_default() -> None:
    own = [["soft_labels"], [{"hard_labels": {}, "weight": 0.1}, {"dist": {"beta": 2}}]]
    names = [recipe_text(r) for r in config({"losses": {"auto": {"recipes": own}}}).recipes]
    assert names == [DEFAULT, "soft_labels", "0.1 hard_labels + dist (beta 2)"]


def test_numbers_are_raced_by_distances() -> None:
    own = {"task": "regression", "task_args": {"loss": "mae"}}
    recipes = config({"losses": "auto"}, **own).recipes
    assert recipes[0] == config({}, **own).loss_terms
    assert {term.name for recipe in recipes for term in recipe} == {
        "target_regression",
        "output_regression",
    }
    assert len(set(map(recipe_text, recipes))) == len(recipes)


def test_losses_that_are_not_decided_yet_are_no_default() -> None:
    undecided = config({"losses": "auto"})
    with pytest.raises(InputError, match="auto"):
        _ = undecided.loss_terms
    chosen = undecided.with_losses(undecided.recipes[3])
    assert chosen.loss_terms == undecided.recipes[3]


@pytest.mark.parametrize(
    ("distill", "says"),
    [
        ({"losses": "atuo"}, r"a list of loss terms, or auto; it is 'atuo'"),
        ({"losses": {"auto": {"epoch": 3}}}, r"unknown key 'distill.losses.auto.epoch'"),
        ({"losses": {"auto": {"recipes": [["x", {"a": {}, "b": {}}]]}}}, r"recipes\.0\.1"),
        ({"losses": {"auto": {"recipes": []}}}, "no loss is named"),
        ({"losses": {"auto": {"reduction": 1}}}, "reduction"),
        ({"losses": {"auto": {"epochs": 21}}}, "21 is more than the training's own epochs, 20"),
        ({"losses": "auto", "scheme": "online"}, "scheme: online does not use"),
        ({"losses": [{"name": "x", "agrs": {}}]}, "did you mean 'args'. known: args, name, weight"),
        ({"keep": "better", "baseline": False}, "set baseline: true"),
        ({"keep": "best"}, "keep"),
    ],
)
def test_what_is_wrong_is_named(distill: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = tmp_path / "n.yaml"
    file.write_text(yaml.safe_dump(PIPELINE | {"distill": distill}))
    with pytest.raises(InputError, match=says):
        load_pipeline(file)
