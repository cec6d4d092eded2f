"""Which images of validation and test have a copy in another split, as an audit of this dataset found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from holotype.bundle import write_text
from holotype.dataset.listing import Split

__all__ = ["read_leaks", "write_leaks"]


def write_leaks(folder: Path, root_hash: str, leaked: Mapping[Split, Sequence[str]]) -> None:
    """Keep the leaked paths of the dataset `root_hash` in its cache folder, for later reports."""
    write_text(_file(folder, root_hash), json.dumps({split: list(paths) for split, paths in leaked.items()}))


def read_leaks(folder: Path, root_hash: str, split: Split) -> frozenset[str] | None:
    """The leaked paths of a split; None where exactly this dataset was not audited."""
    try:
        content = json.loads(_file(folder, root_hash).read_text())
        return frozenset(content.get(split, ()))
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _file(folder: Path, root_hash: str) -> Path:
    return folder / f"leaked-{root_hash[:16]}.json"
