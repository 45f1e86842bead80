"""Sections ``student.prune``, ``student.drop_layers``, ``student.resolution``: a network made
smaller.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from edgekd.config.base import ConfigModel, PositiveInt

Ratio = Annotated[float, Field(gt=0, lt=1)]
Importance = Literal["magnitude", "taylor", "lamp", "random"]
Scope = Literal["layer", "global"]


class PruneConfig(ConfigModel):
    """Section ``student.prune``: structured pruning; complete channels and neurons are removed
    along the network's dependency graph (the extra ``prune``).
    """

    ratio: Ratio | None = None
    """Share of the channels that is removed. With ``ratios`` it is that of the layers not named
    there, none when left out.
    """
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=dict)
    """The share by layer, ``{features.layers.0: 0.25, "encoder.*": 0.5}``: a layer's name, that of
    a module around it, or a pattern with ``*``; of several that match, the last.
    """
    importance: Importance = "magnitude"
    """How channels are ranked."""
    scope: Scope = "layer"
    """``layer``: the share of each layer; ``global``: of all layers together."""
    round_to: PositiveInt = 1
    """Widths stay a multiple of this."""
    keep: tuple[str, ...] = ()
    """Names of layers that are not pruned."""
    inherit: bool = True
    """Whether the remaining channels keep their trained weights; ``false`` trains the same
    structure from fresh ones.
    """

    @model_validator(mode="after")
    def _something(self) -> PruneConfig:
        if self.ratio is None and not any(self.ratios.values()):
            raise ValueError("it removes nothing: add 'ratio: 0.5', or ratios by layer")
        return self


def _check_kept(value: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    if (number and value >= 1) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError(
        f"it is a share between 0 and 1 or a number of blocks from 1 up, and this is {value!r}"
    )


Kept = Annotated[int | float, BeforeValidator(_check_kept)]
"""A share of the blocks, or a number of them."""


class DropLayersConfig(ConfigModel):
    """Section ``student.drop_layers``: repeated blocks are removed, such as the layers of a
    transformer or the residual blocks of a stage; evenly spaced ones remain, as in DistilBERT.
    """

    keep: Kept
    """The blocks that remain of each run of repeated ones: a share (``0.5``) or a number (``6``).
    """


def _check_resolution(value: Any) -> Any:
    sizes = value if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes)
    if not whole or len(sizes) not in ((2,) if sizes is value else (1,)):
        raise ValueError(
            "it is the shorter side in pixels (20) or height and width ([20, 24]), and this is "
            f"{value!r}"
        )
    return value


Resolution = Annotated[
    PositiveInt | tuple[PositiveInt, PositiveInt], BeforeValidator(_check_resolution)
]
"""The shorter side of an image in pixels, or its height and width."""


def as_list(value: Any) -> Any:
    """A list of what may be written as one value."""
    return value if isinstance(value, list | tuple) else [value]


def _check_values(value: Any) -> Any:
    if not value:
        raise ValueError("the list is empty: add a value")
    return value


# Not min_length, which pydantic also reports where a value in the list is wrong.
NotEmpty = AfterValidator(_check_values)
"""For lists that need a value."""


class PruneGrid(ConfigModel):
    """Section ``student.search.candidates.prune``: the keys of ``student.prune``, each a value or
    a list of values that are tried.
    """

    ratio: Annotated[tuple[Ratio, ...], NotEmpty]
    """Shares of the channels that are removed."""
    importance: Annotated[tuple[Importance, ...], NotEmpty] = ("magnitude",)
    """How channels are ranked."""
    scope: Annotated[tuple[Scope, ...], NotEmpty] = ("layer",)
    """``layer``: the share of each layer; ``global``: of all layers together."""
    round_to: Annotated[tuple[PositiveInt, ...], NotEmpty] = (1,)
    """Widths stay a multiple of this."""
    inherit: Annotated[tuple[bool, ...], NotEmpty] = (True,)
    """Whether the remaining channels keep their trained weights."""
    keep: tuple[str, ...] = ()
    """Names of layers that are never pruned: one list for all candidates."""

    @field_validator("ratio", "importance", "scope", "round_to", "inherit", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return as_list(value)


class DropLayersGrid(ConfigModel):
    """Section ``student.search.candidates.drop_layers``: the keys of ``student.drop_layers`` as
    lists.
    """

    keep: Annotated[tuple[Kept, ...], NotEmpty]
    """Shares or numbers of the blocks that remain."""

    @field_validator("keep", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return as_list(value)
