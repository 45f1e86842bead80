"""Sections ``teacher`` and ``student``: which networks, and where their weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgekd.config.section import Count, Positive, Section
from edgekd.config.training import TrainConfig

OutputForm = Literal["logits", "probabilities", "log_probabilities", "sigmoid"]
"""What the numbers of a classifier are: before a softmax, after it, its logarithm, or after a
sigmoid of each."""


class ModelConfig(Section):
    """A network: a built-in name or ``package.module:name``, and its arguments."""

    model: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)


class PreprocessConfig(Section):
    """How a teacher was given its images, where that differs from the student's batch.

    The student's batch is first turned back into pixel values: 0 to 1 for 8-bit images, the
    data's own values for floats. Then, in this order: ``channels`` (1 or 3; grey is repeated,
    colour becomes its luma), ``channel_order``, ``image_size`` [height, width], and
    ``(value · scale - mean) / std`` with one number for all or one for each channel in the
    teacher's order; last ``layout``. ``scale: 255`` is for a teacher of values from 0 to 255.
    Without ``scale``, ``mean`` and ``std`` the data's own normalisation stays.
    """

    channels: Literal[1, 3] | None = None
    channel_order: Literal["rgb", "bgr"] = "rgb"
    image_size: tuple[Count, Count] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    scale: Positive | None = None
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    layout: Literal["nchw", "nhwc"] = "nchw"

    @property
    def normalizes(self) -> bool:
        """Whether the data's own normalisation is replaced."""
        return not (self.scale is None and self.mean is None and self.std is None)


TEACHERS_OWN = "teacher"
"""The student's ``model`` that is the teacher's network with the teacher's weights."""

HUBS = ("timm:", "transformers:")
"""Prefixes of model names whose networks come with their weights."""


class TeacherConfig(ModelConfig):
    """Trained here (``train``), loaded (``checkpoint``), or an ONNX file as a black box.

    A network of a hub (``transformers:NAME``) needs none of them: it is finished.

    ``classes`` names its outputs in their order, in the words of the data's class names (or their
    numbers, where they have none); outputs with other names are left out. Without it the order is
    read from the checkpoint or the ONNX file where it says one. ``output`` says what its numbers
    are; without it that is recognized. ``checkpoint_key`` and ``prefix`` say which of several
    sets of weights in a checkpoint is meant.
    """

    checkpoint: str | None = None
    checkpoint_key: str | None = None
    prefix: str | None = None
    onnx: str | None = None
    train: TrainConfig | None = None
    allow_pickle: bool = False
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    output: OutputForm | None = None
    preprocess: PreprocessConfig | None = None

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        # YAML reads the class names 3 and 0.5 as numbers; true and false it may have made of a
        # name as well, which cannot be told any more.
        return [str(v) if type(v) in (int, float) else v for v in value]

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
        _only_with_checkpoint(self.checkpoint, self.checkpoint_key, self.prefix)
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
    checkpoint_key: str | None = None
    prefix: str | None = None
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
        _only_with_checkpoint(self.checkpoint, self.checkpoint_key, self.prefix)
        return self


def _only_with_checkpoint(checkpoint: str | None, key: str | None, prefix: str | None) -> None:
    named = "checkpoint_key" if key is not None else "prefix"
    if checkpoint is None and (key is not None or prefix is not None):
        raise ValueError(f"{named} says what of a checkpoint is taken: add 'checkpoint: …'")
