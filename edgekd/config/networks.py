"""Sections ``teacher`` and ``student``: which networks, and where their weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgekd.config.section import Count, Section
from edgekd.config.training import TrainConfig


class ModelConfig(Section):
    """A network and its arguments."""

    model: str | None = None
    """``convnet-l``, ``convnet-m``, ``convnet-s``, ``convnet-xs``, ``mlp``, ``policy-l``,
    ``policy-s``; ``timm:NAME`` or ``transformers:NAME_OR_PATH`` (extras of these names); or
    ``package.module:name``.
    """
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the network's constructor."""


TEACHERS_OWN = "teacher"
"""The student's ``model`` that is the teacher's network with the teacher's weights."""

HUBS = ("timm:", "transformers:")
"""Prefixes of model names whose networks come with their weights."""


class TeacherConfig(ModelConfig):
    """Section ``teacher``: give one of ``train``, ``checkpoint`` and ``onnx``; a network of a hub
    (``transformers:NAME``) is already trained and needs none.
    """

    checkpoint: str | None = None
    """Weights of ``model``: safetensors, or a state dict, loaded with ``weights_only``."""
    onnx: str | None = None
    """An ONNX file used as a black box, with its own input names and external data; without
    ``model``.
    """
    train: TrainConfig | None = None
    """Train the teacher here first; ``{}`` takes the defaults."""
    allow_pickle: bool = False
    """Whether a checkpoint that is a pickle may be loaded. It can run any code: only for files
    from a trusted source.
    """

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        origins = [k for k in ("checkpoint", "onnx", "train") if getattr(self, k) is not None]
        if not origins and self.model is not None and self.model.startswith(HUBS):
            return self
        if len(origins) != 1:
            found = " and ".join(origins) or "none of them"
            raise ValueError(
                f"give one of train ({{}} takes its defaults), checkpoint or onnx; there is {found}"
            )
        if self.onnx is None and self.model is None:
            raise ValueError(f"{origins[0]} needs a model to fill: add 'model: …'")
        if self.onnx is not None and self.model is not None:
            raise ValueError("an onnx teacher is a black box: remove 'model'")
        return self


class PruneConfig(Section):
    """Section ``student.prune``: structured pruning; complete channels and neurons are removed
    along the network's dependency graph (the extra ``prune``).
    """

    ratio: Annotated[float, Field(gt=0, lt=1)]
    """Share of the channels that is removed."""
    importance: Literal["magnitude", "taylor", "lamp", "random"] = "magnitude"
    """How channels are ranked."""
    scope: Literal["layer", "global"] = "layer"
    """``layer``: the share of each layer; ``global``: of all layers together."""
    round_to: Count = 1
    """Widths stay a multiple of this."""
    keep: tuple[str, ...] = ()
    """Names of layers that are not pruned."""


class StudentConfig(ModelConfig):
    """Section ``student``: the network that is shipped.

    ``model: teacher`` is the teacher's own network with its weights, to be pruned or to be
    quantized as it is.
    """

    model: str
    """As for the teacher, or ``teacher``."""
    checkpoint: str | None = None
    """Weights to start from."""
    prune: PruneConfig | None = None
    """Remove channels first, and distill the teacher back into what remains. Needs trained
    weights: the teacher's or a checkpoint's.
    """

    @model_validator(mode="after")
    def _weights_to_prune(self) -> StudentConfig:
        if self.model == TEACHERS_OWN and self.checkpoint is not None:
            raise ValueError("'model: teacher' has the teacher's weights: remove 'checkpoint'")
        if self.model == TEACHERS_OWN and self.args:
            raise ValueError("'model: teacher' has the teacher's arguments: remove 'args'")
        if self.prune is not None and self.model != TEACHERS_OWN and self.checkpoint is None:
            raise ValueError(
                "pruning chooses by trained weights: add 'checkpoint: …', or 'model: teacher'"
            )
        return self
