"""Networks with named inputs and outputs: built-in ones, users' own, and their weights."""

from edgekd.models.build import MODELS, build_model
from edgekd.models.dict_model import DictModel, count_parameters
from edgekd.models.weights import load_weights, save_weights

__all__ = [
    "MODELS",
    "DictModel",
    "build_model",
    "count_parameters",
    "load_weights",
    "save_weights",
]
