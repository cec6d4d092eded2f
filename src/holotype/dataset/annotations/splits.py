"""Lists of images that say which split each is in: `train.txt` and its like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holotype.dataset.listing import Split
from holotype.errors import DatasetError

__all__ = ["SplitLists", "read_split_lists", "read_text"]


@dataclass(frozen=True)
class SplitLists:
    """The split of each listed image. `files` is empty where there are no lists: then nothing is said."""

    files: tuple[str, ...]
    splits: Mapping[str, Split]
    clashes: Mapping[str, DatasetError]

    def split_of(self, key: str) -> Split | None:
        """The split of an image; `DatasetError` where it is in none of the lists or in two splits."""
        if not self.files:
            return None
        if key in self.clashes:
            raise self.clashes[key]
        if key not in self.splits:
            raise DatasetError(f"is in none of {', '.join(self.files)}", fix="add it to one, or remove it")
        return self.splits[key]


def read_split_lists(
    root: Path, files: Sequence[tuple[str, Split]], *, key: Callable[[str], str]
) -> SplitLists:
    """Read one image a line; `key` makes of a line what images are looked up by.

    An image in two splits would leak from one into the other: it can be used in neither.
    """
    splits: dict[str, Split] = {}
    places: dict[str, str] = {}
    clashes: dict[str, DatasetError] = {}
    for name, split in files:
        for number, line in enumerate(read_text(root / name, name=name).splitlines(), start=1):
            if not line.strip():
                continue
            item, place = key(line.strip()), f"{name}: line {number}"
            if splits.setdefault(item, split) != split:
                text = f"{item} is in {split} here and in {splits[item]} at {places[item]}"
                clashes[item] = DatasetError(text, where=place, fix="keep it in one split")
            places.setdefault(item, place)
    return SplitLists(tuple(name for name, _ in files), splits, clashes)


def read_text(file: Path, *, name: str) -> str:
    """A small UTF-8 text file, or a `DatasetError`."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"cannot be read ({error.strerror})", where=name, fix="check the file") from error
    except UnicodeDecodeError as error:
        raise DatasetError("is not UTF-8", where=name, fix="save it as UTF-8") from error
