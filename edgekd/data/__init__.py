"""Data: sources, splits, storage and loading. Only loader.py imports torch."""

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
