"""The data of a bundle, read again as it was read when the bundle was trained.

Splits go by a hash of each image and two shares, and by revisions, which may move images. Read with other
shares, or as a later revision has them, validation and test would hold images that the bundle was trained on,
and whatever is measured there would look better than it is. Labels are always the newest: they say more about
what is right, and nothing about what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holotype.bundle import Bundle
from holotype.config import DatasetConfig
from holotype.dataset.index import Dataset, open_dataset
from holotype.dataset.revisions import latest_revision, read_revisions
from holotype.dataset.store import cache_folder
from holotype.errors import DatasetError
from holotype.progress import note

__all__ = ["LAYOUT", "as_trained", "open_for", "recorded_source", "tell_splits"]

LAYOUT = {"format", "boxes", "margin", "background", "images"}
"""Settings of the data that are about how one dataset lies on the disk, and say nothing of another."""

_SHARES = {"validation", "test"}
_REVISIONS = {"revision", "split_revision"}


def open_for(bundle: Bundle, data: Path | str | None, *, config: DatasetConfig) -> Dataset:
    """The images of `data`, by default what the bundle was trained on, as the bundle sees and splits them.

    What `config` says by name is done as it says. Errors as of `open_dataset` and `recorded_source`.
    """
    source = Path(data) if data is not None else recorded_source(bundle)
    settings = as_trained(bundle, source, config=config)
    tell_splits(bundle, source, settings)
    return open_dataset(source, spec=bundle.manifest.preprocess, config=settings)


def as_trained(bundle: Bundle, source: Path, *, config: DatasetConfig) -> DatasetConfig:
    """`config`, where it is silent with the shares of validation and test that the bundle was trained with.

    Where `source` is the very dataset, also with the layout that it was read in, its format and boxes, and
    with the splits of the revision of then. Bundles of equal splits get equal settings.
    """
    told, same = _told(bundle), _is_own(bundle, source)
    names = (_SHARES | LAYOUT if same else _SHARES) & told.keys() - config.model_fields_set
    said = config.model_dump(exclude_unset=True) | {name: told[name] for name in names}
    known = _revision(bundle) if same and not _REVISIONS & config.model_fields_set else None
    if known is not None and known <= latest_revision(cache_folder(source)):
        said["split_revision"] = _origin(_moving(source), known)
    return DatasetConfig.model_validate(said)


def tell_splits(bundle: Bundle, source: Path, settings: DatasetConfig) -> None:
    """A note where images of `source` were moved between its splits since the bundle was trained on it.

    `settings` are those of `as_trained`: whether its own splits are used, or cannot be had.
    """
    known = _revision(bundle)
    if known is None or not _is_own(bundle, source) or settings.revision != "latest":
        return
    moving, used = _moving(source), settings.split_revision
    if used is not None and used == _origin(moving, known) and any(one > used for one in moving):
        note(
            f"splits are those that {bundle.path} was trained with: images have been moved between them since"
            " (--set data.split_revision=... chooses others)"
        )
    if used is None and known > latest_revision(cache_folder(source)):
        note(
            f"{bundle.path} was trained with revision {known} of labels and splits, which is not on this"
            " machine: it may have learned from what is validation or test here"
        )


def _told(bundle: Bundle) -> dict[str, Any]:
    told: dict[str, Any] = bundle.manifest.settings.get("data", {})
    return told


def _is_own(bundle: Bundle, source: Path) -> bool:
    """Whether `source` is what the bundle was trained on."""
    recorded = bundle.manifest.lineage.dataset
    return recorded is not None and source.resolve() == Path(recorded)


def _revision(bundle: Bundle) -> int | None:
    """The revision whose splits the bundle was trained with; None where its manifest does not say it."""
    told = _told(bundle)
    number = told.get("revision") if told.get("split_revision") is None else told["split_revision"]
    return number if isinstance(number, int) else None


def _moving(source: Path) -> list[int]:
    """The revisions that place images in splits; others change labels alone, or leave images out."""
    folder = cache_folder(source)
    known = read_revisions(folder, latest_revision(folder))
    return [one.number for one in known if any(change.split for change in one.changes)]


def _origin(moving: Sequence[int], revision: int) -> int:
    """Of the revisions that move images, the one whose splits `revision` has; 0: those of the data itself."""
    return max((one for one in moving if one <= revision), default=0)


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
