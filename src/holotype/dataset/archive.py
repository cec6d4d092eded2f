"""A dataset given as .tar or .zip: unpacked once into its cache folder, member by member, within limits.

Nothing in an archive is trusted: its names, its sizes, its kinds of members. One that could write outside the
folder, point out of it or fill the disk is refused as a whole, and nothing of it is left behind.
"""

from __future__ import annotations

import lzma
import shutil
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from stat import S_IFMT, S_ISREG
from typing import IO

from holotype.dataset.folders import DEBRIS
from holotype.dataset.listing import SPLIT_NAMES
from holotype.errors import DatasetError
from holotype.locks import locked
from holotype.progress import Tracker, track

__all__ = ["ENDINGS", "is_archive", "unpacked"]

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")

_MAX_MEMBERS = 5_000_000
_MAX_RATIO = 100
"""Images hardly compress, annotations by ten; what unpacks to more than this times its size is a bomb."""
_RATIO_FROM = 64 * 1024 * 1024
_STEP = 1024 * 1024

_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    UnicodeError,
)
"""What the standard library raises for archives that are damaged, encrypted or packed in unknown ways."""


@dataclass(frozen=True)
class _Member:
    """One entry of an archive; `content` is None where it is no regular file."""

    name: str
    folder: bool
    content: IO[bytes] | None


def is_archive(source: Path) -> bool:
    """Whether a dataset's path is that of an archive, by its name."""
    return source.name.lower().endswith(ENDINGS) and source.is_file()


def unpacked(archive: Path, *, folder: Path, limit_gb: float) -> Path:
    """The folder of what `archive` holds, below `folder`; unpacked at most once for each size and time of it.

    Raises `DatasetError` where it is damaged or encrypted, where a member leaves the folder or is a link or a
    device, and where there are too many or too large ones.
    """
    status = archive.stat()
    target = folder / f"unpacked-{status.st_size}-{status.st_mtime_ns}"
    with locked(folder):
        if not target.is_dir():
            for left in folder.glob("unpack*"):
                shutil.rmtree(left)
            scratch = folder / f"unpacking-{uuid.uuid4().hex[:12]}"
            scratch.mkdir()
            try:
                _unpack(archive, scratch, limit=_limit(archive, scratch, limit_gb=limit_gb))
                scratch.replace(target)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    return _inner(target)


@dataclass(frozen=True)
class _Limit:
    """How many bytes may come out of an archive, and what to say where there are more."""

    bytes: int
    error: DatasetError


def _limit(archive: Path, target: Path, *, limit_gb: float) -> _Limit:
    """The least of what the user allows, what the disk has, and what images could unpack to."""
    ratio = max(_MAX_RATIO * archive.stat().st_size, _RATIO_FROM)
    free = shutil.disk_usage(target).free // 2
    allowed = int(limit_gb * 1e9)
    if ratio <= min(free, allowed):
        return _Limit(ratio, _refused(archive, f"unpacks to more than {_MAX_RATIO} times its size"))
    what = f"unpacks to more than {min(free, allowed) / 1e9:.3g} GB"
    if allowed <= free:
        return _Limit(allowed, DatasetError(what, where=archive, fix="raise --set data.max_unpacked_gb"))
    fix = f"make room in {target.parent}, of which half is left free, or set HOLOTYPE_CACHE"
    return _Limit(free, DatasetError(what, where=archive, fix=fix))


def _unpack(archive: Path, target: Path, *, limit: _Limit) -> None:
    left, count = limit.bytes, 0
    try:
        with archive.open("rb") as stream, track("unpacking", total=archive.stat().st_size) as progress:
            told = 0
            members = _zipped(stream) if archive.suffix.lower() == ".zip" else _tarred(stream)
            for member in members:
                count += 1
                if count > _MAX_MEMBERS:
                    raise _refused(archive, f"holds more than {_MAX_MEMBERS:,} members")
                if member.folder:
                    continue
                place = _place(archive, target, member)
                if member.content is None:
                    raise _refused(archive, f"holds {member.name!r}, which is a link or no regular file")
                left -= _write(member.content, place, at_most=left)
                if left < 0:
                    raise limit.error
                told = _advance(progress, stream.tell(), told)
    except _DAMAGED as error:
        raise _damaged(archive, error) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise _refused(archive, f"holds {Path(str(error.filename)).name!r} twice") from error
    except OSError as error:
        if error.errno is None:  # as bz2 and gzip say that they are damaged
            raise _damaged(archive, error) from error
        raise DatasetError(
            f"cannot be unpacked ({error.strerror or error})",
            where=target.parent,
            fix="make room, or unpack it elsewhere and name the folder",
        ) from error


def _tarred(stream: IO[bytes]) -> Iterator[_Member]:
    # As a stream: members come in the order they are stored, and nothing is read twice.
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for entry in tar:
            regular = entry.isfile() and not entry.issparse()
            yield _Member(entry.name, entry.isdir(), tar.extractfile(entry) if regular else None)


def _zipped(stream: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(stream) as packed:
        for entry in packed.infolist():
            kind = entry.external_attr >> 16  # as Unix has it; zero where another system packed it
            if entry.is_dir():
                yield _Member(entry.filename, folder=True, content=None)
            elif S_IFMT(kind) and not S_ISREG(kind):
                yield _Member(entry.filename, folder=False, content=None)
            else:
                with packed.open(entry) as content:
                    yield _Member(entry.filename, folder=False, content=content)


def _place(archive: Path, target: Path, member: _Member) -> Path:
    """Where a member belongs; refused where that is not below `target`, on any system."""
    name = PurePosixPath(member.name.replace("\\", "/"))
    if not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        raise _refused(archive, f"holds {member.name!r}, which is outside of it")
    place = target / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _write(content: IO[bytes], place: Path, *, at_most: int) -> int:
    """Copy one file, whatever it says of its size; returns how many bytes came, one step too many at most."""
    written = 0
    with place.open("xb") as file:
        while written <= at_most and (chunk := content.read(_STEP)):
            written += len(chunk)
            file.write(chunk)
    return written


def _advance(progress: Tracker, position: int, told: int) -> int:
    # The directory of a .zip is at its end, so that its position goes to and fro.
    if position > told:
        progress.advance(position - told)
    return max(position, told)


def _damaged(archive: Path, error: Exception) -> DatasetError:
    reason = str(error) or type(error).__name__
    return DatasetError(
        f"cannot be unpacked ({reason})", where=archive, fix="pack it again, without a password"
    )


def _refused(archive: Path, why: str) -> DatasetError:
    return DatasetError(
        f"is refused: it {why}",
        where=archive,
        fix="pack the images alone, or unpack it by hand and name the folder",
    )


def _inner(folder: Path) -> Path:
    """The folder itself, or the only one in it that everything is packed in."""
    while True:
        entries = [e for e in folder.iterdir() if not e.name.startswith(".") and e.name not in DEBRIS]
        wrapped = len(entries) == 1 and entries[0].is_dir() and entries[0].name.lower() not in SPLIT_NAMES
        if not wrapped or not any(entry.is_dir() for entry in entries[0].iterdir()):
            return folder
        folder = entries[0]
