"""Samples: where they come from, how they are split, stored and fed. torch only in loader.py."""

from edgekd.data.dataset import Dataset, Preprocess, Split, open_dataset, save_dataset
from edgekd.data.sources import load_dataset, source_fingerprint

__all__ = [
    "Dataset",
    "Preprocess",
    "Split",
    "load_dataset",
    "open_dataset",
    "save_dataset",
    "source_fingerprint",
]
