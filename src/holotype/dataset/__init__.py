"""Datasets: reading layouts, the index with its hashes, splits, and the pixel cache."""

from holotype.dataset.index import (
    Dataset,
    Instead,
    Unreadable,
    check_splits,
    index_dataset,
    margin_shape,
    open_dataset,
)
from holotype.dataset.listing import SPLITS, Listing, Problem, Record, Split
from holotype.dataset.store import Shape, cache_folder, dataset_name
from holotype.dataset.thumbnails import thumbnailer, thumbnailer_below
from holotype.dataset.trained import LAYOUT, as_trained, open_for, recorded_source, tell_splits

__all__ = [
    "LAYOUT",
    "SPLITS",
    "Dataset",
    "Instead",
    "Listing",
    "Problem",
    "Record",
    "Shape",
    "Split",
    "Unreadable",
    "as_trained",
    "cache_folder",
    "check_splits",
    "dataset_name",
    "index_dataset",
    "margin_shape",
    "open_dataset",
    "open_for",
    "recorded_source",
    "tell_splits",
    "thumbnailer",
    "thumbnailer_below",
]
