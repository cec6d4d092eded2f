"""Datasets: reading layouts, the index with its hashes, splits, and the pixel cache."""

from holotype.dataset.index import Dataset, Unreadable, margin_shape, open_dataset, recorded_source
from holotype.dataset.listing import SPLITS, Listing, Record, Split
from holotype.dataset.store import Shape, dataset_name

__all__ = [
    "SPLITS",
    "Dataset",
    "Listing",
    "Record",
    "Shape",
    "Split",
    "Unreadable",
    "dataset_name",
    "margin_shape",
    "open_dataset",
    "recorded_source",
]
