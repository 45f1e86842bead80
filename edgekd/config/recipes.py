"""Loss terms as recipes: the default one, and the candidates of ``distill.losses: auto``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.config.training import LossTerm, Recipe, Schedule

CONTINUOUS_TASKS = ("regression", "policy")


def _of(hard: float, name: str, weight: float | Schedule = 1.0, **args: Any) -> Recipe:
    """Hard labels of a weight, and one loss against the teacher."""
    soft = LossTerm(name=name, args=args, weight=weight)
    return (LossTerm(name="hard_labels", weight=hard), soft) if hard else (soft,)


_OF_CLASSES = (
    _of(0.1, "soft_labels", 0.9, temperature=4.0),
    _of(0.1, "soft_labels", 0.9, temperature=1.0),
    _of(0.1, "soft_labels", 0.9, temperature=2.0),
    _of(0.1, "soft_labels", 0.9, temperature=8.0),
    _of(0.5, "soft_labels", 0.5, temperature=4.0),
    _of(0, "soft_labels", temperature=4.0),
    _of(1, "dkd", Schedule(start=0, end=1, over=0.1), beta=2.0),
    _of(1, "wsld", 2.5),
    _of(1, "dist", 2.0),
    _of(0.1, "logit_standardization", 9.0),
)
"""The weights are those of the papers; DKD's β is 8 for 100 classes, and less for fewer."""


def default_recipe(task: str, task_args: Mapping[str, Any]) -> Recipe:
    """A tenth against the labels and nine tenths against the teacher: soft labels at T = 4.

    Continuous outputs have no classes: both are distances there.
    """
    return built_in_recipes(task, task_args)[0]


def built_in_recipes(task: str, task_args: Mapping[str, Any]) -> tuple[Recipe, ...]:
    """The candidates of a race, the default one first; all compare outputs only."""
    if task not in CONTINUOUS_TASKS:
        return _OF_CLASSES
    own = str(task_args.get("loss", "mse"))
    kinds = [own, *(kind for kind in ("mse", "mae", "huber") if kind != own)]

    def pair(kind: str, hard: float) -> Recipe:
        args = {"kind": kind}
        target = LossTerm(name="target_regression", args=args, weight=hard)
        output = LossTerm(name="output_regression", args=args, weight=1 - hard)
        return (target, output) if hard else (output,)

    return (*(pair(kind, 0.1) for kind in kinds), pair(own, 0.5), pair(own, 0))


def recipe_text(recipe: Recipe) -> str:
    """A recipe in a line: ``0.1 hard_labels + 0.9 soft_labels (temperature 4)``."""
    return " + ".join(_term_text(term) for term in recipe)


def _term_text(term: LossTerm) -> str:
    args = ", ".join(f"{key} {_value_text(value)}" for key, value in term.args.items())
    text = term.name + (f" ({args})" if args else "")
    return text if term.weight == 1 else f"{_value_text(term.weight)} {text}"


def _value_text(value: Any) -> str:
    if isinstance(value, Schedule):
        return f"({value.start:g} to {value.end:g} over {value.over:g})"
    return f"{value:g}" if isinstance(value, float) else str(value)
