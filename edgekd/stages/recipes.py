"""The race of ``distill.losses: auto``, and the objective that a distillation ended up with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.host import world_size
from edgekd.config.pipeline import PipelineConfig
from edgekd.config.recipes import recipe_text
from edgekd.config.training import LossTerm, Recipe
from edgekd.pipeline.stage import Context
from edgekd.stages.task_data import TaskData, read_json, write_json
from edgekd.stages.training import augmentation_of, fit

if TYPE_CHECKING:
    from edgekd.distill.schemes import SchemeContext
    from edgekd.students.race import RaceResult

RECIPES = "recipes.json"

_FEWEST_EPOCHS = 2


def race_rungs(config: PipelineConfig, recipes: int) -> tuple[int, ...]:
    """The epochs of each rung of the race of so many recipes."""
    from edgekd.students.race import rungs_of

    auto = config.distill.auto
    assert auto is not None
    quarter = min(config.distill.epochs, max(_FEWEST_EPOCHS, config.distill.epochs // 4))
    return rungs_of(auto.epochs or quarter, recipes, auto.reduction)


def race_recipes(
    task_data: TaskData, scheme_context: SchemeContext, context: Context
) -> PipelineConfig:
    """Race the recipes on validation data, write ``recipes.json``; the pipeline with the winner.

    All start from the student's initial weights and see the same batches. The trials are in
    ``race.sqlite3`` in the run's cache folder, which Optuna's tools read; a race that was stopped
    resumes. ``torchrun``'s processes train each recipe together.

    Raises:
        InputError: Optuna is missing.
        StageError: no recipe could be trained.
    """
    from edgekd.distill.objective import Objective
    from edgekd.students.race import epochs_of, race

    config, say = task_data.config, context.progress.message
    auto, task = config.distill.auto, task_data.task
    assert auto is not None
    recipes = {recipe_text(recipe): recipe for recipe in config.recipes}
    default = next(iter(recipes))
    if auto.recipes is None:
        for name, reason in _unsuitable(recipes, task_data).items():
            del recipes[name]
            say(f"  losses: without {name}: {reason}")
    rungs = race_rungs(config, len(recipes))
    most = epochs_of(rungs, len(recipes), auto.reduction, kept=1)
    say(
        f"  losses: auto: {len(recipes)} recipes are raced on validation data, for "
        f"{', then '.join(map(str, rungs))} epochs each; at most {most} epochs of the student in "
        f"all, besides the {config.distill.epochs} of its training"
    )
    numbers = {name: number for number, name in enumerate(recipes, start=1)}

    def train(name: str, epochs: int) -> float:
        where = f"distill.losses.auto ({name})"
        objective = Objective(recipes[name], task, config.distill.label_smoothing, where)
        settings = config.distill.model_copy(update={"epochs": epochs})
        label = f"recipe {numbers[name]} for {epochs} epochs"
        model, teacher = scheme_context.new_student(0), scheme_context.teacher
        return fit(task_data, model, objective, settings, label, context, teacher).best.validation

    context.cache.mkdir(parents=True, exist_ok=True)
    alone = world_size() == 1
    result = race(
        tuple(recipes),
        train,
        rungs=rungs,
        reduction=auto.reduction,
        storage=f"sqlite:///{context.cache / 'race.sqlite3'}" if alone else None,
        study=f"recipes {context.fingerprints.get('distill', config.name)[:16]}",
        objectives=[(task.metric, "max" if task.higher_is_better else "min")],
        keep=[default],
        say=say,
        where="distill.losses",
    )
    why = _why(result, default, task_data)
    say(f"  losses: {result.winner}: {why}")
    rows = [
        {
            "name": name,
            "terms": _terms_json(recipes[name]),
            "rungs": [
                {"epochs": s.epochs, "score": s.values[task.metric], "seconds": s.seconds}
                for s in result.rungs[name]
            ],
            "failed": result.failed.get(name),
        }
        for name in result.order
    ]
    write_json(
        context.out / RECIPES,
        {
            "schema": "edgekd/recipes/1",
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "reduction": auto.reduction,
            "recipes": rows,
            "winner": result.winner,
            "terms": _terms_json(recipes[result.winner]),
            "why": why,
        },
    )
    return config.with_losses(recipes[result.winner])


def trained_config(config: PipelineConfig, distill: Path) -> PipelineConfig:
    """The pipeline with the losses that its stage ``distill`` trained with.

    Args:
        config: as written; its losses may be ``auto``.
        distill: the stage's artifact, which records the winner of the race.
    """
    if config.distill.auto is None:
        return config
    terms = read_json(distill / RECIPES)["terms"]
    return config.with_losses(tuple(LossTerm.model_validate(term) for term in terms))


def _terms_json(recipe: Recipe) -> list[dict[str, Any]]:
    return [term.model_dump(mode="json") for term in recipe]


def _unsuitable(recipes: Mapping[str, Recipe], task_data: TaskData) -> dict[str, str]:
    """The built-in recipes that these data exclude, with the reason."""
    from edgekd.data.transforms import mixing
    from edgekd.distill.objective import Objective

    config = task_data.config
    cache, classes = config.distill.cache, task_data.num_classes
    mixed = mixing(augmentation_of(config, config.distill)) is not None
    found = {}
    for name, recipe in recipes.items():
        objective = Objective(recipe, task_data.task)
        if mixed and objective.needs_hard_label:
            found[name] = "it needs one class per sample, and two are mixed"
        elif cache is not None and classes > cache.top and objective.needs_full_logits:
            found[name] = f"it compares all {classes} logits, and {cache.top} are cached"
    return found


def _why(result: RaceResult, default: str, task_data: TaskData) -> str:
    """Why the winner won, with the default's score at the same number of epochs."""
    metric, score = task_data.task.metric, result.rungs[result.winner][-1]
    samples = len(task_data.dataset.splits["validation"])
    text = (
        f"{metric} {score.values[metric]:.4f} after {score.epochs} epochs on "
        f"{samples:,} validation samples"
    )
    if default == result.winner:
        return f"{text}; no other recipe was better than the default"
    of_default = [s for s in result.rungs[default] if s.epochs == score.epochs]
    return text + "".join(f"; the default gave {s.values[metric]:.4f}" for s in of_default)
