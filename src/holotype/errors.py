"""Every error a user can meet, each saying what went wrong, where, and how to fix it.

HolotypeError
├── ConfigError            a key, flag or value that we do not understand
├── MissingExtraError      an optional library is not installed
├── DatasetError           the dataset as a whole cannot be used
├── ModelError             unknown architecture, weights that do not fit or cannot be found
├── TrainingError          training cannot go on
├── BundleError            a bundle is missing, damaged, or not what it claims to be
├── ParityError            two runtimes disagree on real images
├── ServerError            the server cannot start or an inference process is gone
└── ImageError             one image cannot be read; carries the HTTP status that says why
    ├── EmptyImageError        400
    ├── ImageTooLargeError     413
    ├── UnsupportedImageError  415
    └── BrokenImageError       422
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, ClassVar

__all__ = [
    "BrokenImageError",
    "BundleError",
    "ConfigError",
    "DatasetError",
    "EmptyImageError",
    "HolotypeError",
    "ImageError",
    "ImageTooLargeError",
    "MissingExtraError",
    "ModelError",
    "ParityError",
    "ServerError",
    "TrainingError",
    "UnsupportedImageError",
    "require",
]


class HolotypeError(Exception):
    """An error with its place and its remedy; `str()` is always one line."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        line = what if self.where is None else f"{self.where}: {what}"
        line = line if fix is None else f"{line}; {fix}"
        super().__init__(" ".join(line.split()))


class ConfigError(HolotypeError):
    exit_code = 2


class MissingExtraError(HolotypeError):
    pass


class DatasetError(HolotypeError):
    pass


class ModelError(HolotypeError):
    pass


class TrainingError(HolotypeError):
    pass


class BundleError(HolotypeError):
    pass


class ParityError(HolotypeError):
    pass


class ServerError(HolotypeError):
    pass


class ImageError(HolotypeError):
    """One image that cannot be read. `status` is the HTTP status that tells a client why."""

    status: ClassVar[int] = 422


class EmptyImageError(ImageError):
    status = 400


class ImageTooLargeError(ImageError):
    status = 413


class UnsupportedImageError(ImageError):
    status = 415


class BrokenImageError(ImageError):
    status = 422


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import an optional library, or raise `MissingExtraError` with the line that installs it."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise MissingExtraError(
            f"{purpose} needs the Python package {module.partition('.')[0]!r}",
            fix=f"run: pip install 'holotype[{extra}]'",
        )
    return importlib.import_module(module)
