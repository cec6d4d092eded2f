"""Embeddings of a dataset's images by a frozen backbone, computed once and kept in its cache folder."""

from __future__ import annotations

import hashlib
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import timm

from holotype.bundle import sync
from holotype.config import ModelConfig
from holotype.dataset import Dataset, Instead, cache_folder
from holotype.errors import BundleError
from holotype.machine import available_cores, cache_root
from holotype.models import architecture_of, choose_device, pretrained
from holotype.onnx_export import export_onnx
from holotype.preprocess import Pixels, Preprocess
from holotype.progress import note, track
from holotype.runtime import Runtime, load_onnx, torch_runtime

__all__ = ["EMBEDDED_AT_ONCE", "Backbone", "Embedding", "embed", "embeddings_of"]

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

EMBEDDED_AT_ONCE = 8
"""Images: on CPUs as fast as larger batches, with a quarter of the memory of 32."""


class Embedding(Protocol):
    """What gives the embeddings of pixels, and a key for those it has computed."""

    @property
    def key(self) -> str: ...

    def __call__(self, images: Pixels) -> Floats: ...


@dataclass(frozen=True)
class Backbone:
    """A frozen network with pretrained weights, for pixels of one size; built when it is first asked.

    As it was pretrained: what `model` asks to be put into it is not there.
    """

    model: ModelConfig
    spec: Preprocess
    device: str = "auto"

    @property
    def key(self) -> str:
        """Hash of all that decides an embedding: architecture, weights and pixel path."""
        file = Path(self.model.weights)
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
        model = self.model
        # What timm knows as the weights of a name may change with it.
        parts = (model.name, model.weights, content, timm.__version__, self.spec.digest)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def runtime(self) -> Runtime:
        """On a CPU onnxruntime, which is twice as fast as eager torch; its file is kept for the next time."""
        device = choose_device(self.device)
        file = cache_root() / "backbones" / f"{self.model.name}-{self.key}.onnx"
        if device.type == "cpu" and file.is_file():
            with suppress(BundleError):  # a damaged one is made anew
                return load_onnx(file, threads=available_cores())
        plain = ModelConfig(name=self.model.name, weights=self.model.weights)
        architecture = architecture_of(plain, self.spec, classes=2)
        classifier, origin = pretrained(architecture, weights=self.model.weights)
        note(f"embeddings by {self.model.name} ({origin} weights), {self.spec}")
        if device.type != "cpu":
            return torch_runtime(classifier.eval(), device=str(device))
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{uuid.uuid4().hex[:12]}.onnx")
        try:
            export_onnx(classifier, scratch, classes=("", ""), preprocess=self.spec)
            sync(scratch)
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)
        return load_onnx(file, threads=available_cores())

    def __call__(self, images: Pixels) -> Floats:
        """`float32[N, D]` of `uint8[N, H, W, 3]`, in small batches."""
        return embeddings_of(self.runtime, images)


def embeddings_of(runtime: Runtime, images: Pixels) -> Floats:
    """`float32[N, D]` of `uint8[N, H, W, 3]`, in small batches."""
    starts = range(0, len(images), EMBEDDED_AT_ONCE)
    return np.concatenate([runtime.run(images[at : at + EMBEDDED_AT_ONCE]).embedding for at in starts])


def embed(
    dataset: Dataset,
    *,
    backbone: Embedding,
    rows: Rows | None = None,
    instead: Instead | None = None,
) -> Floats:
    """`float32[N, D]`, the embeddings of `rows: int64[N]`, by default of all of `dataset`.

    Those of images with equal pixels are computed once, and what an earlier call computed is read back, also
    what it had finished before it was interrupted. `instead` is that of `Dataset.pixels`: what is shown
    instead of a broken file is not remembered as its embedding.
    """
    file = cache_folder(dataset.source) / f"embeddings-{backbone.key}.npz"
    known, values = _recall(file)
    wanted = np.arange(len(dataset.table)) if rows is None else rows
    digests = dataset.table["pixels_sha256"].gather(wanted).to_list()
    todo = {digest: int(row) for digest, row in zip(digests, wanted, strict=True) if digest not in known}
    if not todo:
        return _looked_up(digests, known, values)
    order = sorted(todo, key=lambda digest: todo[digest])
    fresh: list[Floats] = []
    replaced: set[int] = set()

    def replace(row: int, error: str) -> int:
        if instead is None:
            raise AssertionError("asked for a replacement that nobody offers")
        replaced.add(row)
        return instead(row, error)

    try:
        lacking = np.array([todo[digest] for digest in order], dtype=np.int64)
        _compute(dataset, lacking, backbone, into=fresh, instead=replace if instead is not None else None)
    finally:
        if fresh:
            added = np.concatenate(fresh).astype(np.float16)
            values = np.concatenate([values, added]) if len(values) else added
            known.update({digest: len(known) + place for place, digest in enumerate(order[: len(added)])})
            lost = {digest for digest in order if todo[digest] in replaced}
            _remember(file, {digest: place for digest, place in known.items() if digest not in lost}, values)
    return _looked_up(digests, known, values)


def _looked_up(digests: Sequence[str], known: Mapping[str, int], values: npt.NDArray[np.float16]) -> Floats:
    return values[[known[digest] for digest in digests]].astype(np.float32)


def _compute(
    dataset: Dataset,
    rows: Rows,
    embedding: Callable[[Pixels], Floats],
    *,
    into: list[Floats],
    instead: Instead | None,
) -> None:
    batches = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    with track("embedding images", total=len(rows)) as progress:
        for images in dataset.pixels(batches, instead=instead):
            into.append(embedding(images))
            progress.advance(len(images))


def _recall(file: Path) -> tuple[dict[str, int], npt.NDArray[np.float16]]:
    """What an earlier call computed; nothing where that is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            digests, values = content["digests"].tobytes().hex(), content["values"]
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile):
        return {}, np.zeros((0, 0), dtype=np.float16)
    return {digests[64 * row : 64 * (row + 1)]: row for row in range(len(values))}, values


def _remember(file: Path, known: Mapping[str, int], values: npt.NDArray[np.float16]) -> None:
    """Half precision: the cosine of two embeddings moves by less than 1e-3, mostly by 1e-5."""
    digests = np.frombuffer(bytes.fromhex("".join(known)), dtype=np.uint8).reshape(-1, 32)
    scratch = file.with_name(f".{uuid.uuid4().hex[:12]}.npz")
    try:
        np.savez(scratch, digests=digests, values=values[list(known.values())])
        sync(scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
