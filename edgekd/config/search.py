"""Section ``student.search``: the student is chosen among candidates."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgekd.config.base import ConfigModel, PositiveInt
from edgekd.config.pruning import DropLayersGrid, NotEmpty, PruneGrid, Resolution, as_list

_MOST = 1000
"""Combinations that are built to estimate their size, at most."""

Objective = Literal["accuracy", "latency", "memory", "size"]


class CandidateSource(ConfigModel):
    """An entry of ``student.search.candidates``: all combinations of its lists are candidates.

    Without ``model`` they are the teacher's own network made smaller, with its weights.
    """

    model: str | None = None
    """As in the section ``student``; left out: the teacher's network."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the network's constructor, the same for all."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Arguments with the values that are tried: ``{widths: [[8, 16], [16, 32]], blocks: [0, 1]}``.
    """
    checkpoint: str | None = None
    """Weights of ``model`` to start from."""
    drop_layers: DropLayersGrid | None = None
    """Repeated blocks are removed."""
    prune: PruneGrid | None = None
    """Channels are removed, after the blocks."""
    resolution: Annotated[tuple[Resolution, ...], NotEmpty] | None = None
    """Sizes of the image inside the network, each as ``student.resolution``: ``[28, 20]`` are two.
    """

    @field_validator("resolution", mode="before")
    @classmethod
    def _resolutions(cls, value: Any) -> Any:
        return None if value is None else as_list(value)

    @field_validator("grid", mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        grid = {key: as_list(values) for key, values in value.items()}
        if empty := [key for key, values in grid.items() if not values]:
            raise ValueError(f"{empty[0]!r} has no values: give a list such as [1, 2]")
        return grid

    @model_validator(mode="after")
    def _complete(self) -> CandidateSource:
        if self.model in (None, "teacher"):
            if self.args or self.grid or self.checkpoint is not None:
                raise ValueError(
                    "args, grid and checkpoint are those of a model: add 'model: …'; without one "
                    "it is the teacher's network"
                )
            if self.prune is None and self.drop_layers is None and self.resolution is None:
                raise ValueError(
                    "it would be the teacher unchanged: add model, prune, drop_layers or resolution"
                )
        elif self.prune is not None and self.checkpoint is None:
            raise ValueError(
                "pruning chooses by trained weights: add 'checkpoint: …', or leave model out for "
                "the teacher's network"
            )
        if both := sorted(set(self.args) & set(self.grid)):
            raise ValueError(f"{both[0]!r} is in args and in grid: remove one")
        return self

    @property
    def count(self) -> int:
        """The number of combinations."""
        lists: list[Any] = [*self.grid.values(), self.resolution or (None,)]
        if self.drop_layers is not None:
            lists.append(self.drop_layers.keep)
        if self.prune is not None:
            p = self.prune
            lists += [p.ratio, p.importance, p.scope, p.round_to, p.inherit]
        return math.prod(map(len, lists))


class SearchConfig(ConfigModel):
    """Section ``student.search``: candidates are proposed, measured as they would be shipped, and
    those within the budgets are raced: short distillations by successive halving, of which the best
    are trained for longer. The winner is the student.
    """

    candidates: tuple[CandidateSource, ...] | None = None
    """Where candidates come from. Left out: the teacher with a quarter to seven eighths of its
    channels removed, with half and three quarters of its repeated blocks where it has such, and
    the built-in networks that fit the data.
    """
    max_candidates: Annotated[int, Field(ge=2)] = 24
    """Candidates that are measured, at most; of more, those of evenly spread size."""
    epochs: PositiveInt | None = None
    """Epochs of the race's last rung. Left out: a quarter of ``distill.epochs``, at least 2."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One candidate of so many is promoted to the next rung, which has so many times the epochs."""
    objectives: Annotated[tuple[Objective, ...], NotEmpty] = ("accuracy",)
    """What counts: ``accuracy``, ``latency``, ``memory``, ``size``. With several, candidates that
    no other one dominates are promoted, and the first objective decides the winner.
    """
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each budget that must be left over."""
    storage: str | None = None
    """Where trials are stored, as a URL of SQLAlchemy; several processes may share it. Left out:
    SQLite in the run folder.
    """

    @field_validator("candidates")
    @classmethod
    def _several(
        cls, value: tuple[CandidateSource, ...] | None
    ) -> tuple[CandidateSource, ...] | None:
        if value is None:
            return value
        count = sum(source.count for source in value)
        if count == 0:
            raise ValueError("the list is empty: add an entry, or remove it for the default ones")
        if count > _MOST:
            raise ValueError(
                f"its lists have {count:,} combinations, and at most {_MOST:,} are compared by "
                "size before any is measured: shorten a list"
            )
        if count == 1:
            raise ValueError(
                "it has one candidate, and there is nothing to choose: write it as 'student: …' "
                "without search"
            )
        return value

    @field_validator("objectives")
    @classmethod
    def _different(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if twice := [name for name in value if value.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice: remove one")
        if "accuracy" not in value:
            raise ValueError(
                "accuracy is not among them, and the smallest candidate would always win: add "
                "accuracy"
            )
        return value

    def last_epochs(self, distill_epochs: int) -> int:
        """Epochs of the last rung, for a pipeline whose student is trained that many."""
        return self.epochs or max(2, distill_epochs // 4)
