"""Sections ``teacher`` and ``student``: which networks, and where their weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgekd.config.base import ConfigModel, PositiveFloat, PositiveInt
from edgekd.config.pruning import DropLayersConfig, PruneConfig, Resolution
from edgekd.config.search import SearchConfig
from edgekd.config.training import TrainConfig

OutputForm = Literal["logits", "probabilities", "log_probabilities", "sigmoid"]
"""What a classifier's outputs are: logits, softmax probabilities, log-probabilities, or sigmoid
probabilities."""


class ModelConfig(ConfigModel):
    """A network and its arguments."""

    model: str | None = None
    """``convnet-l``, ``convnet-m``, ``convnet-s``, ``convnet-xs``, ``mobilenet``, ``transformer``
    (of patches of an image, or of a signal), ``mlp``, ``policy-l``, ``policy-s``; ``timm:NAME`` or
    ``transformers:NAME_OR_PATH`` (extras of these names); or ``package.module:name``.
    """
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the network's constructor: of a ``convnet`` ``widths``, ``blocks``,
    ``stem_stride``, ``residual``, ``dropout``; of ``mobilenet`` ``width``, ``depth``,
    ``expansion``, ``dropout``; of ``transformer`` ``width``, ``depth``, ``heads``, ``expansion``,
    ``patch``, ``dropout``; of ``mlp`` ``hidden``, ``dropout``; of a ``policy`` ``widths``,
    ``blocks``, ``hidden``, ``stem_stride``, ``dropout``.
    """


class PreprocessConfig(ConfigModel):
    """How the teacher's images are preprocessed, where that differs from the student's batch.

    The student's batch is first turned back into pixel values: 0 to 1 for 8-bit images, the
    data's own values for floats. The keys are then applied in their order, with the normalization
    ``(value · scale - mean) / std``. Without ``scale``, ``mean`` and ``std`` the data's own
    normalization stays.
    """

    channels: Literal[1, 3] | None = None
    """Number of channels: grey is repeated three times; colour becomes its luma."""
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """The order of the colour channels."""
    image_size: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width in pixels."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    """How images are resized."""
    scale: PositiveFloat | None = None
    """Factor of the pixel values: 255 for a teacher that takes values from 0 to 255."""
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """One number for all channels, or one for each in the teacher's order."""
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    """Standard deviation, in the same form as ``mean``."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """The order of the axes: N samples, C channels, height, width."""

    @property
    def normalizes(self) -> bool:
        """Whether the data's own normalisation is replaced."""
        return not (self.scale is None and self.mean is None and self.std is None)


TEACHERS_OWN = "teacher"
"""The student's ``model`` that stands for the teacher's network with its weights."""

HUBS = ("timm:", "transformers:")
"""Prefixes of model names whose networks include trained weights."""


class TeacherConfig(ModelConfig):
    """Section ``teacher``: give one of ``train``, ``checkpoint`` and ``onnx``; a network of a hub
    (``transformers:NAME``) is already trained and needs none.
    """

    checkpoint: str | None = None
    """Weights of ``model``: safetensors, or a state dict, loaded with ``weights_only``."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in the checkpoint is loaded, such as ``state_dict_ema``."""
    prefix: str | None = None
    """Prefix of the weights' names in the checkpoint, such as ``teacher.``; detected where
    it is the same for all.
    """
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
    classes: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """The names of its outputs in their order, as the data name their classes (or number them,
    where they have no names); outputs with other names are left out. Without it the order is read
    from the checkpoint or the ONNX file where that records one.
    """
    output: OutputForm | None = None
    """What its outputs are; detected when left out."""
    preprocess: PreprocessConfig | None = None
    """How its images are preprocessed, where that differs from the student's."""

    @field_validator("classes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        # YAML reads the class names 3 and 0.5 as numbers; a true or false may have been a
        # name as well, which cannot be recovered.
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


class StudentConfig(ModelConfig):
    """Section ``student``: the network that is shipped, or a ``search`` that chooses it.

    ``model: teacher`` is the teacher's network with its weights, to be made smaller or
    quantized unchanged.
    """

    model: str | None = None
    """As for the teacher, or ``teacher``."""
    checkpoint: str | None = None
    """Weights to start from."""
    checkpoint_key: str | None = None
    """Which of several sets of weights in the checkpoint is loaded, such as ``state_dict_ema``."""
    prefix: str | None = None
    """Prefix of the weights' names in the checkpoint, such as ``teacher.``; detected where
    it is the same for all.
    """
    drop_layers: DropLayersConfig | None = None
    """Remove repeated blocks first; the others keep their weights."""
    prune: PruneConfig | None = None
    """Remove channels first, then distill the teacher into the pruned network. Needs trained
    weights: the teacher's or a checkpoint's.
    """
    resolution: Resolution | None = None
    """Size to which images are resized inside the network, and so inside its ONNX file, which
    takes the images as the data have them: the shorter side in pixels, or height and width.
    """
    search: SearchConfig | None = None
    """Choose the student among candidates by the budgets; instead of all other keys. ``{}`` takes
    the defaults.
    """

    @property
    def inherits(self) -> bool:
        """Whether a pruned network keeps the weights of its remaining channels."""
        return self.prune is None or self.prune.inherit

    @model_validator(mode="after")
    def _weights_to_prune(self) -> StudentConfig:
        if self.search is not None:
            given = [k for k, v in self if k != "search" and v not in (None, {})]
            if given:
                raise ValueError(
                    f"search chooses the student: remove {', '.join(map(repr, given))}, or write "
                    "it as an entry of search.candidates"
                )
            return self
        if self.model is None:
            raise ValueError("no network is named: add 'model: …', or 'search: {}'")
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
