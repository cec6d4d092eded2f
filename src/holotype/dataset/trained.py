"""The data of a bundle, read again as it was read when the bundle was trained.

Splits go by a hash of each image and two shares. Read with other shares, validation and test would hold
images that the bundle was trained on, and whatever is measured there would look better than it is.
"""

from __future__ import annotations

from pathlib import Path

from holotype.bundle import Bundle
from holotype.config import DatasetConfig
from holotype.dataset.index import Dataset, open_dataset
from holotype.errors import DatasetError

__all__ = ["LAYOUT", "as_trained", "open_for", "recorded_source"]

LAYOUT = {"format", "boxes", "margin", "background", "images"}
"""Settings of the data that are about how one dataset lies on the disk, and say nothing of another."""

_SHARES = {"validation", "test"}


def open_for(bundle: Bundle, data: Path | str | None, *, config: DatasetConfig) -> Dataset:
    """The images of `data`, by default what the bundle was trained on, as the bundle sees and splits them.

    What `config` says by name is done as it says. Errors as of `open_dataset` and `recorded_source`.
    """
    source = Path(data) if data is not None else recorded_source(bundle)
    return open_dataset(
        source, spec=bundle.manifest.preprocess, config=as_trained(bundle, source, config=config)
    )


def as_trained(bundle: Bundle, source: Path, *, config: DatasetConfig) -> DatasetConfig:
    """`config`, where it is silent with the shares of validation and test that the bundle was trained with.

    Where `source` is the very dataset, also with the layout that it was read in: its format and boxes.
    """
    told, recorded = bundle.manifest.settings.get("data", {}), bundle.manifest.lineage.dataset
    same = recorded is not None and source.resolve() == Path(recorded)
    names = (_SHARES | LAYOUT if same else _SHARES) & told.keys() - config.model_fields_set
    said = config.model_dump(exclude_unset=True)
    return DatasetConfig.model_validate(said | {name: told[name] for name in names})


def recorded_source(bundle: Bundle) -> Path:
    """The dataset that a bundle was trained on, as its lineage says; `DatasetError` where it is not here."""
    recorded = bundle.manifest.lineage.dataset
    if recorded is None or not Path(recorded).exists():
        raise DatasetError(
            "the dataset it was trained on is not on this machine" if recorded else "names no dataset",
            where=bundle.path,
            fix="name one: --data DATA",
        )
    return Path(recorded)
