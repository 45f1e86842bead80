"""Sections ``teacher`` and ``student``: which networks, and where their weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgekd.config.section import Count, Section
from edgekd.config.training import TrainConfig


class ModelConfig(Section):
    """A network: a built-in name or ``package.module:name``, and its arguments."""

    model: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)


TEACHERS_OWN = "teacher"
"""The student's ``model`` that is the teacher's network with the teacher's weights."""

HUBS = ("timm:", "transformers:")
"""Prefixes of model names whose networks come with their weights."""


class TeacherConfig(ModelConfig):
    """Trained here (``train``), loaded (``checkpoint``), or an ONNX file as a black box.

    A network of a hub (``transformers:NAME``) needs none of them: it is finished.
    """

    checkpoint: str | None = None
    onnx: str | None = None
    train: TrainConfig | None = None
    allow_pickle: bool = False

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
    """Structured pruning: whole channels and neurons go, by the dependency graph of the network.

    ``ratio`` is the share of channels that goes, of each layer or (``scope: global``) of all
    together. ``round_to`` keeps widths a multiple of it. ``keep`` names layers that stay whole.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)]
    importance: Literal["magnitude", "taylor", "lamp", "random"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    round_to: Count = 1
    keep: tuple[str, ...] = ()


class StudentConfig(ModelConfig):
    """The network that is shipped. ``checkpoint`` starts it from given weights.

    ``model: teacher`` is the teacher's own network with its weights: to be pruned, or quantized
    as it is. ``prune`` needs weights to choose by: those of the teacher or of a checkpoint.
    """

    model: str
    checkpoint: str | None = None
    prune: PruneConfig | None = None

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
