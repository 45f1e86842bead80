"""Samples: where they come from, how they are split, stored and fed. torch only in loader.py."""

from edgekd.data.dataset import Dataset, Preprocess, Split
from edgekd.data.sources import load_dataset, source_fingerprint
from edgekd.data.store import open_dataset, save_dataset

__all__ = [
    "Dataset",
    "Preprocess",
    "Split",
    "load_dataset",
    "open_dataset",
    "save_dataset",
    "source_fingerprint",
]
