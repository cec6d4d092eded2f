"""What makes a pair a copy on this set: thresholds from altered copies of its own images."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from holotype.audit.alignment import SIDE, aligned_distance, coarse_distance
from holotype.audit.contract import Calibration
from holotype.audit.signatures import Signatures, all_orientations, reduced_to, signatures_of
from holotype.config import DuplicatesConfig
from holotype.dataset import Dataset
from holotype.errors import ImageError
from holotype.preprocess import Pixels, read_pixels

__all__ = ["ALTERATIONS", "Thresholds", "calibrate", "pictures_of", "unit"]

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Dice = np.random.Generator
Embed = Callable[[Pixels], Floats]

_IMAGES = 100
_RANDOM_PAIRS = 200_000
_COMPARED_PAIRS = 10_000
_ALIGNED_PAIRS = 1_000
_LEAST_TAIL, _LEAST_TAIL_OF_ALL = 20, 100  # pairs; where all pairs are few, many of the alike are copies
_TAIL = (0.05, 0.3)  # quantiles between which the tail's exponent is measured
_KEPT = 0.98  # of the copies of each alteration; the threshold is a margin above
_MARGIN = 1.25
_FARTHEST = 0.6  # pixel distance beyond which nothing is taken for a copy
_CANDIDATES = 10  # by hash for each image, which are all looked at
_CROP = 0.95  # of each side
_LARGEST_SIDE = 1024  # pixels of an image that is altered: what a model sees, and a hundred fit into memory


@dataclass(frozen=True)
class Thresholds:
    """A pair is looked at when its hashes or its embeddings are near, and a copy when the pictures align.

    `hash_distance` in bits, `embedding_distance` in 1 - cosine, `coarse` and `pixel` in 1 - correlation, of
    the small pictures and of the aligned detail; all inclusive.
    """

    hash_distance: int
    embedding_distance: float
    coarse: float
    pixel: float


@dataclass(frozen=True)
class _Copies:
    """Distances of altered copies to their originals, each `[alterations, images]`."""

    hashes: npt.NDArray[np.uint8]
    embeddings: Floats
    coarse: Floats
    pixels: Floats

    def of(self, images: npt.NDArray[np.bool_]) -> _Copies:
        return _Copies(
            self.hashes[:, images], self.embeddings[:, images], self.coarse[:, images], self.pixels[:, images]
        )


def _mirrored(image: Image.Image, _: Dice) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _turned(image: Image.Image, dice: Dice) -> Image.Image:
    return image.rotate(90 * int(dice.integers(1, 4)), expand=True)


def _cropped(image: Image.Image, dice: Dice) -> Image.Image:
    width, height = max(round(image.width * _CROP), 1), max(round(image.height * _CROP), 1)
    left, top = dice.integers(0, image.width - width + 1), dice.integers(0, image.height - height + 1)
    return image.crop((int(left), int(top), int(left) + width, int(top) + height))


def _brightened(image: Image.Image, dice: Dice) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(float(dice.choice([0.8, 1.25])))


ALTERATIONS: dict[str, Callable[[Image.Image, Dice], Image.Image]] = {
    "re-encoded": lambda image, _: image,
    "mirrored": _mirrored,
    "turned": _turned,
    "brightened": _brightened,
    "cropped by 5 %": _cropped,
    "mirrored and cropped": lambda image, dice: _cropped(_mirrored(image, dice), dice),
}
"""What is done to an image to make a copy; every copy is also written as a JPEG of quality 50 to 90."""


def calibrate(
    dataset: Dataset,
    signatures: Signatures,
    embeddings: Floats,
    rows: Rows,
    *,
    embed: Embed,
    config: DuplicatesConfig,
    seed: int,
) -> tuple[Thresholds, Calibration] | None:
    """Thresholds that let nearly all altered copies pass, unless too many others would pass by chance.

    `embeddings` is `float32[N, D]` of length 1; `rows`, `int64[M]`, are the images that count: of exact
    copies one each. None for fewer than two images, or images without any detail.
    """
    dice = np.random.default_rng(seed)
    count = len(rows)
    if count < 2:
        return None
    chosen = np.sort(dice.choice(rows, min(_IMAGES, count), replace=False))
    copies = _make_copies(dataset, signatures, embeddings, chosen, embed=embed, dice=dice)
    if copies is None:
        return None
    # A picture without detail has no copy that could be told, and says nothing about those of others.
    plain = copies.pixels.min(axis=0) > _FARTHEST
    if plain.all():
        return None
    clear = copies.of(~plain)
    first, second = (rows[places] for places in _random_pairs(count, dice))
    hashes = all_orientations(signatures.hashes[first], signatures.hashes[second])
    by_hash = _largest_rare(hashes, rate=2 * _CANDIDATES / count)
    # Crops escape the hash, and turned pictures the embedding: each is calibrated on what it can see.
    seen = [name not in ("cropped by 5 %", "mirrored and cropped") for name in ALTERATIONS]
    by_hash = min(int(np.quantile(clear.hashes[seen], 0.99)), by_hash)
    upright = [name != "turned" for name in ALTERATIONS]
    by_embedding = _most(clear.embeddings[upright])
    coarse = _most(clear.coarse)
    pixel, rate = _pixel_threshold(
        dataset, signatures, (first, second), clear, coarse=coarse, allowed=config.false_copies
    )
    thresholds = Thresholds(by_hash, by_embedding, coarse, pixel)
    passed = (copies.hashes <= by_hash) | (copies.embeddings <= by_embedding)
    passed &= (copies.coarse <= coarse) & (copies.pixels <= pixel)
    return thresholds, Calibration(
        hash_distance=by_hash,
        embedding_distance=by_embedding,
        pixel_distance=pixel,
        found={name: float(row.mean()) for name, row in zip(ALTERATIONS, passed, strict=True)},
        false_copies=rate,
        copies=copies.pixels.size,
        random_pairs=len(first),
    )


def pictures_of(dataset: Dataset, rows: Rows) -> Floats:
    """`float32[K, 3, SIDE, SIDE]`, the pictures of `rows` that are aligned and compared."""
    batches = [rows[start : start + 64] for start in range(0, len(rows), 64)]
    parts = [reduced_to(pixels, SIDE) for pixels in dataset.pixels(batches)]
    return np.concatenate(parts) if parts else np.zeros((0, 3, SIDE, SIDE), dtype=np.float32)


def _make_copies(
    dataset: Dataset,
    signatures: Signatures,
    embeddings: Floats,
    chosen: Rows,
    *,
    embed: Embed,
    dice: Dice,
) -> _Copies | None:
    """Alter, encode and decode images as files would be, and measure how far they are from the originals."""
    originals = pictures_of(dataset, chosen)
    small = signatures.small[chosen]
    images = [_image_of(dataset, path) for path in dataset.paths(chosen)]
    there = np.array([image is not None for image in images])
    if not there.any():
        return None
    rows = []
    for alter in ALTERATIONS.values():
        pixels = np.stack(
            [_encoded(alter(image, dice), dataset, dice=dice) for image in images if image is not None]
        )
        vectors = unit(embed(pixels))
        hashes, tiny = signatures_of(pixels)
        rows.append(
            _Copies(
                all_orientations(signatures.hashes[chosen[there]], hashes),
                1 - (vectors * embeddings[chosen[there]]).sum(axis=1),
                coarse_distance(small[there], tiny),
                aligned_distance(originals[there], reduced_to(pixels, SIDE)),
            )
        )
    return _Copies(
        np.stack([row.hashes for row in rows]),
        np.stack([row.embeddings for row in rows]),
        np.stack([row.coarse for row in rows]),
        np.stack([row.pixels for row in rows]),
    )


def unit(vectors: Floats) -> Floats:
    """Rows scaled to length 1."""
    length = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors / length, dtype=np.float32)


def _image_of(dataset: Dataset, path: str) -> Image.Image | None:
    try:
        image = Image.fromarray(dataset.picture(path))
    except (OSError, ImageError):
        return None
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    return image


def _encoded(image: Image.Image, dataset: Dataset, *, dice: Dice) -> Pixels:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(dice.integers(50, 91)))
    return read_pixels(buffer.getvalue(), spec=dataset.spec, limits=dataset.limits)


def _random_pairs(count: int, dice: Dice) -> tuple[Rows, Rows]:
    """Pairs of different rows in random order: every pair once where there are few."""
    if count * (count - 1) // 2 <= _RANDOM_PAIRS:
        pairs = dice.permutation(np.stack(np.triu_indices(count, 1), axis=1)).astype(np.int64)
        return pairs[:, 0], pairs[:, 1]
    first, second = dice.integers(0, count, (2, _RANDOM_PAIRS))
    apart = first != second
    return first[apart], second[apart]


def _most(distances: Floats) -> float:
    """What nearly all copies of the worst alteration keep: distances `[alterations, images]`."""
    return _MARGIN * float(np.quantile(distances, _KEPT, axis=1).max())


def _largest_rare(distances: npt.NDArray[np.uint8], *, rate: float) -> int:
    """The largest distance that no more than `rate` of these have or are below; -1 where there is none."""
    share = np.cumsum(np.bincount(distances, minlength=65)) / len(distances)
    return int(np.searchsorted(share, rate, side="right")) - 1


def _pixel_threshold(
    dataset: Dataset,
    signatures: Signatures,
    pairs: tuple[Rows, Rows],
    copies: _Copies,
    *,
    coarse: float,
    allowed: float,
) -> tuple[float, float]:
    """The distance that most copies keep, lowered until chance explains no more than `allowed` of the images.

    A random pair passes if it is coarsely alike and then aligns closer than the threshold. How rarely it does
    is read off the distances of such pairs, whose lower tail follows a power of the distance (the exponent is
    the intrinsic dimension of the set: Levina & Bickel 2004). Also returns that share of the images.
    """
    wanted = _most(copies.pixels)
    first, second = pairs
    alike, share = _alike(signatures, first, second, coarse=coarse)
    distances = aligned_distance(pictures_of(dataset, first[alike]), pictures_of(dataset, second[alike]))
    # Copies are among the random pairs, too; they must not speak for the others.
    others = distances[distances > np.median(copies.pixels)].astype(np.float64)
    if len(others) < (_LEAST_TAIL if len(first) > _RANDOM_PAIRS // 2 else _LEAST_TAIL_OF_ALL):
        return wanted, 0.0
    near, far = np.quantile(others, _TAIL)
    exponent = np.log(_TAIL[1] / _TAIL[0]) / max(float(np.log(far / near)), 1e-3)
    at_near = share * len(others) / len(distances) * _TAIL[0] * len(dataset.table)
    bound = float(near * min((allowed / at_near) ** (1 / exponent), 1.0))
    limit = min(wanted, bound)
    return limit, min(float(at_near * (limit / near) ** exponent), 1.0)


def _alike(signatures: Signatures, first: Rows, second: Rows, *, coarse: float) -> tuple[Rows, float]:
    """Places of up to 1,000 pairs that are coarsely alike, and the share of all pairs that are."""
    found: list[Rows] = []
    looked_at = count = 0
    while looked_at < len(first) and count < _ALIGNED_PAIRS:
        part = slice(looked_at, looked_at + _COMPARED_PAIRS)
        distances = coarse_distance(signatures.small[first[part]], signatures.small[second[part]])
        found.append(np.flatnonzero(distances <= coarse) + looked_at)
        looked_at += len(distances)
        count += len(found[-1])
    return np.concatenate(found)[:_ALIGNED_PAIRS], count / looked_at
