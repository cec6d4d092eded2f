"""Datasets given as .tar and .zip: read as the folder they hold, or refused with nothing left behind."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from digits import write_flat
from holotype.config import DatasetConfig
from holotype.dataset import Dataset, cache_folder, open_dataset
from holotype.errors import DatasetError
from holotype.preprocess import Preprocess

SPEC = Preprocess(height=32, width=32)

Pack = Callable[[Path, Path], None]


def tar(folder: Path, archive: Path) -> None:
    mode = {".tar": "w", ".gz": "w:gz", ".bz2": "w:bz2"}[archive.suffix]
    with tarfile.open(archive, mode) as packed:
        packed.add(folder, arcname="digits")


def zipped(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.mkdir("__MACOSX")
        for file in sorted(folder.rglob("*.png")):
            packed.write(file, f"digits/{file.relative_to(folder).as_posix()}")


def read(source: Path, **settings: object) -> Dataset:
    return open_dataset(source, spec=SPEC, config=DatasetConfig.model_validate(settings))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flat(tmp_path_factory.mktemp("archive") / "digits")


@pytest.mark.parametrize(
    ("name", "pack"),
    [("digits.tar", tar), ("digits.tar.gz", tar), ("digits.tar.bz2", tar), ("digits.zip", zipped)],
)
def test_an_archive_is_the_folder_it_holds(flat: Path, tmp_path: Path, name: str, pack: Pack) -> None:
    pack(flat, tmp_path / name)
    archived, folder = read(tmp_path / name), read(flat)
    assert archived.root_hash == folder.root_hash
    assert archived.source == tmp_path / name, "the lineage names what the user named"
    assert cache_folder(tmp_path / name).name.startswith("digits-")


def test_it_is_unpacked_once_and_anew_when_it_changes(flat: Path, tmp_path: Path) -> None:
    archive = tmp_path / "digits.tar"
    tar(flat, archive)
    first = read(archive)
    marked = first.file(first.table["path"][0]).stat().st_ino
    again = read(archive)
    assert again.file(again.table["path"][0]).stat().st_ino == marked
    less = tmp_path / "less"
    shutil.copytree(flat, less)
    shutil.rmtree(less / "2")
    tar(less, archive)
    changed = read(archive)
    assert changed.classes == ("0", "1")
    assert not first.root.exists(), "what an archive held before is not kept"


def test_the_splits_of_an_archive_stay_splits(flat: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as packed:
        for file in sorted(flat.rglob("*.png")):
            packed.write(file, f"train/{file.relative_to(flat).as_posix()}")
    assert read(tmp_path / "d.zip").classes == ("0", "1", "2"), "train alone is a split, not a wrapping"


def test_the_command_line_takes_it(flat: Path, tmp_path: Path) -> None:
    zipped(flat, tmp_path / "digits.zip")
    result = subprocess.run(
        [sys.executable, "-m", "holotype", "convert", "digits.zip", "out.csv"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + len(list(flat.rglob("*.png")))


def member(name: str, content: bytes = b"x", *, kind: bytes = tarfile.REGTYPE, to: str = "") -> bytes:
    """A .tar of one good image and one more member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as packed:
        for info, data in ((tarfile.TarInfo("0/good.png"), b"y"), (tarfile.TarInfo(name), content)):
            info.size = len(data) if info.name != name or kind == tarfile.REGTYPE else 0
            if info.name == name:
                info.type, info.linkname = kind, to
            packed.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def zip_member(name: str, *, mode: int = 0, size: int = 1) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        packed.writestr(info, bytes(size))
    return stream.getvalue()


HOSTILE = {
    "parent.tar": (member("../canary"), "outside"),
    "absolute.tar": (member("/tmp/canary"), "outside"),
    "deep.tar": (member("0/../../canary"), "outside"),
    "windows.tar": (member("0\\..\\..\\canary"), "outside"),
    "drive.tar": (member("C:/canary"), "outside"),
    "symlink.tar": (member("0/link.png", kind=tarfile.SYMTYPE, to="/etc/passwd"), "link"),
    "hardlink.tar": (member("0/hard.png", kind=tarfile.LNKTYPE, to="0/good.png"), "link"),
    "pipe.tar": (member("0/pipe.png", kind=tarfile.FIFOTYPE), "no regular file"),
    "twice.tar": (member("0/good.png"), "twice"),
    "below-a-file.tar": (member("0/good.png/deeper.png"), "twice"),
    "cut.tar": (member("0/b.png", bytes(4000))[:3000], "cannot be unpacked"),
    "no-archive.tar": (b"not an archive at all", "cannot be unpacked"),
    "no-archive.zip": (b"not an archive at all", "cannot be unpacked"),
    "parent.zip": (zip_member("../canary"), "outside"),
    "symlink.zip": (zip_member("0/link.png", mode=0o120777), "link"),
    "bomb.zip": (zip_member("0/bomb.png", size=100_000_000), "100 times"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    archive = tmp_path / name
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match=words) as caught:
        read(archive)
    assert caught.value.where == str(archive)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    cache = cache_folder(archive)
    assert [path.name for path in cache.iterdir()] == [".lock"]
    assert not list(cache.parent.rglob("canary"))
    assert not Path("/tmp/canary").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_an_archive_says_of_its_sizes_counts_for_nothing(tmp_path: Path) -> None:
    content = bytearray(zip_member("0/bomb.png", size=100_000_000))
    for place in (content.find(b"PK\x01\x02") + 24, content.find(b"PK\x03\x04") + 22):
        content[place : place + 4] = (10).to_bytes(4, "little")
    archive = tmp_path / "liar.zip"
    archive.write_bytes(content)
    with pytest.raises(DatasetError):
        read(archive)
    assert [path.name for path in cache_folder(archive).iterdir()] == [".lock"]


def test_the_limit_is_the_users(flat: Path, tmp_path: Path) -> None:
    tar(flat, tmp_path / "digits.tar")
    with pytest.raises(DatasetError, match=r"1e-06 GB.*data\.max_unpacked_gb"):
        read(tmp_path / "digits.tar", max_unpacked_gb=1e-6)
    assert read(tmp_path / "digits.tar", max_unpacked_gb=1)


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs a small file system")
def test_a_full_disk_is_said_and_nothing_is_left(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        monkeypatch.setenv("HOLOTYPE_CACHE", str(disk))
        tar(flat, tmp_path / "digits.tar")
        with pytest.raises(DatasetError, match=r"GB|No space left"):
            read(tmp_path / "digits.tar")
        assert not list(disk.rglob("*.png"))
    finally:
        subprocess.run(["umount", disk], check=True)
