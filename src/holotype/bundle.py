"""The bundle: an immutable folder that holds everything a classifier is, each payload with its hash.

holotype.json        manifest: classes, preprocess, policy, metrics, lineage, versions, payload hashes
architecture.json    what `models.build` needs to make the network again
weights.safetensors  its weights
model.onnx           images: uint8[N, H, W, 3] → logits: float32[N, C], embedding: float32[N, D]
openvino/            the same as OpenVINO IR (after `export --format openvino`)
tensorrt.onnx        the same as TensorRT builds engines of (after `export --format tensorrt`)
golden.npz           a few real inputs and the outputs they gave, checked at every load
baseline.npz         what normal looks like: embeddings, answers and brightness of validation images
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from holotype.errors import BundleError
from holotype.policy import Policy
from holotype.preprocess import Pixels, Preprocess

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Bundle",
    "Golden",
    "Lineage",
    "Manifest",
    "Payload",
    "PayloadName",
    "Precision",
    "hash_file",
    "home_of",
    "library_versions",
    "open_bundle",
    "read_golden",
    "replace_folder",
    "resolve",
    "sync",
    "write_bundle",
    "write_bytes",
    "write_golden",
    "write_text",
]

SCHEMA_VERSION = 2
MANIFEST = "holotype.json"

Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""In which arithmetic a bundle was measured and accepted."""

PayloadName = Literal[
    "weights", "architecture", "onnx", "openvino", "openvino_weights", "tensorrt", "golden", "baseline"
]


_FROZEN = ConfigDict(frozen=True, extra="forbid")


class Payload(BaseModel):
    """One file of a bundle: its POSIX path inside the folder, SHA-256, and size in bytes."""

    model_config = _FROZEN

    path: str
    sha256: str
    bytes: int


class Lineage(BaseModel):
    """Where a bundle comes from: the data, the settings, and the bundle it was made of."""

    model_config = _FROZEN

    dataset: str | None = None
    dataset_root_hash: str | None = None
    config_sha256: str | None = None
    parent: str | None = None


class Manifest(BaseModel):
    """Contents of `holotype.json`. Classes are mapped by name, never by position.

    `settings` are those it was trained with, resolved: what is trained of it later begins from them.
    `compression` says how it was made smaller, empty where it was not.
    """

    model_config = _FROZEN

    schema_version: int = SCHEMA_VERSION
    classes: tuple[str, ...]
    preprocess: Preprocess
    policy: Policy = Policy()
    precision: Precision = "fp32"
    settings: dict[str, Any] = {}
    compression: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    lineage: Lineage = Lineage()
    versions: dict[str, str] = {}
    payloads: dict[PayloadName, Payload] = {}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose hashes were checked."""

    path: Path
    manifest: Manifest
    hash: str

    def payload(self, name: PayloadName) -> Path | None:
        """The file of payload `name`, or None where this bundle has no such payload."""
        found = self.manifest.payloads.get(name)
        return None if found is None else self.path / found.path

    def network_files(self, *, purpose: str = "", fix: str) -> tuple[Path, Path]:
        """Architecture and torch weights; `BundleError` with `purpose` and `fix` where it has none."""
        architecture, weights = self.payload("architecture"), self.payload("weights")
        if architecture is None or weights is None:
            raise BundleError(f"has no torch weights{purpose}", where=self.path, fix=fix)
        return architecture, weights


@dataclass(frozen=True)
class Golden:
    """Real inputs `uint8[N, H, W, 3]` and the logits `float32[N, C]` the exported model gave for them."""

    images: Pixels
    logits: npt.NDArray[np.float32]


def resolve(target: Path | str) -> Path:
    """The bundle folder that `target` means: a bundle itself, or the `best` of a run folder."""
    path = Path(target)
    for candidate in (path, path / "best"):
        if (candidate / MANIFEST).is_file():
            return candidate
    if not path.exists():
        raise BundleError(
            "no such bundle or run folder", where=path, fix="check the path, or run holotype train"
        )
    raise BundleError(
        f"neither a bundle nor a run folder (no {MANIFEST} in it or in its best/)",
        where=path,
        fix="give the folder that holotype train wrote, such as runs/NAME",
    )


def home_of(target: Path | str) -> Path:
    """Where findings about `target` go: into the run folder, or beside a bundle, which is immutable."""
    target = Path(target)
    return target.parent if (target / MANIFEST).is_file() else target


def open_bundle(target: Path | str) -> Bundle:
    """Read a bundle and verify every hash; `BundleError` names the first thing that is wrong."""
    path = resolve(target)
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_bytes())
        claimed = raw.pop("hash")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BundleError(
            f"unreadable manifest ({type(error).__name__}: {error})", where=file, fix="restore the bundle"
        ) from error
    version = raw.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"schema version {version} is newer than the {SCHEMA_VERSION} this holotype reads",
            where=file,
            fix="upgrade holotype",
        )
    if _digest(raw) != claimed:
        raise BundleError(
            "the manifest was changed after it was written", where=file, fix="restore the bundle"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"invalid manifest at {place}: {first['msg']}", where=file) from error
    for payload in manifest.payloads.values():
        _verify(path, payload)
    return Bundle(path=path, manifest=manifest, hash=claimed)


def _verify(folder: Path, payload: Payload) -> None:
    relative = PurePosixPath(payload.path)
    file = folder / payload.path
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"payload path {payload.path!r} leaves the bundle", where=folder)
    if file.is_symlink() or not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        raise BundleError("payload is missing or not a regular file", where=file, fix="restore the bundle")
    if file.stat().st_size != payload.bytes or hash_file(file) != payload.sha256:
        raise BundleError("payload does not match its hash", where=file, fix="restore the bundle")


def write_bundle(target: Path, manifest: Manifest, *, files: Mapping[PayloadName, Path]) -> Bundle:
    """Copy `files` and write the manifest as one atomic step; an existing bundle at `target` is replaced.

    A file keeps its name; the two of OpenVINO go to `openvino/`. `BundleError` where `target` is something
    else than a bundle or an empty folder.
    """
    if target.exists() and not (target / MANIFEST).is_file() and not _is_empty_folder(target):
        raise BundleError("is in the way and not a bundle", where=target, fix="choose another path")
    with replace_folder(target) as folder:
        payloads: dict[PayloadName, Payload] = {}
        for name, source in files.items():
            relative = f"openvino/{source.name}" if name.startswith("openvino") else source.name
            copy = folder / relative
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, copy)
            sync(copy)
            payloads[name] = Payload(path=relative, sha256=hash_file(copy), bytes=copy.stat().st_size)
        complete = manifest.model_copy(update={"payloads": payloads})
        content = complete.model_dump(mode="json")
        digest = _digest(content)
        write_text(folder / MANIFEST, json.dumps({"hash": digest, **content}, indent=1) + "\n")
    return Bundle(path=target, manifest=complete, hash=digest)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def write_golden(file: Path, golden: Golden) -> None:
    np.savez_compressed(file, images=golden.images, logits=golden.logits)


def read_golden(bundle: Bundle) -> Golden:
    """The golden inputs and outputs of a bundle; `BundleError` where it has none."""
    file = bundle.payload("golden")
    if file is None:
        raise BundleError("no golden inputs, so nothing proves that it still works", where=bundle.path)
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return Golden(images=arrays["images"], logits=arrays["logits"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"unreadable golden inputs ({error})", where=file, fix="restore the bundle"
        ) from error


def hash_file(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that a bundle's numbers depend on."""
    names = ("holotype", "numpy", "Pillow", "onnx", "onnxruntime", "openvino", "torch", "timm")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_text(file: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Write through a temporary file, fsync and rename, so that a reader sees the old content or the new."""
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.write_bytes(data)
        sync(scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `target` that takes its place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    scratch = target.with_name(f".{target.name}.{token}")
    retired = target.with_name(f".{target.name}.{token}.old")
    scratch.mkdir()
    try:
        yield scratch
        sync(scratch)
        if target.exists():
            target.rename(retired)
        try:
            scratch.rename(target)
        except OSError:
            if retired.exists():
                retired.rename(target)
            raise
        sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
