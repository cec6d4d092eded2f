"""What normal looks like to a classifier: its baseline, against which new images are compared.

Captured when a bundle is made, from images of its own dataset in its own runtime: where the embeddings of
each class are, how often each class is answered, how sure the answers are, how bright the images. A single
image is unfamiliar by its distance; a stream of images has drifted when its statistics have moved.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.bundle import Bundle
from holotype.errors import BundleError

__all__ = ["Baseline", "distances", "make_baseline", "open_baseline", "read_baseline", "write_baseline"]

Floats = npt.NDArray[np.float32]

_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Baseline:
    """Arrays of one bundle, D features and C classes.

    `class_means[C, D]` and `within[D]` are means and pooled variance of the embeddings of training images;
    `mean[D]`, `variance[D]`, `rates[C]` (answers), `confidence[N]` (of the answers, sorted), `brightness[N]`
    (mean of an image's pixels in [0, 1], sorted) and `distance[N]` (sorted) are of the validation split.
    """

    class_means: Floats
    within: Floats
    mean: Floats
    variance: Floats
    rates: Floats
    confidence: Floats
    brightness: Floats
    distance: Floats


def make_baseline(
    *,
    train: tuple[Floats, npt.NDArray[np.int64]],
    embedding: Floats,
    chances: npt.NDArray[np.float64],
    brightness: Floats,
) -> Baseline:
    """From embeddings `[M, D]` and labels `[M]` of training images, and what validation images gave."""
    features, labels = train
    classes = chances.shape[1]
    means = np.zeros((classes, features.shape[1]), dtype=np.float32)
    present = np.unique(labels)
    for label in present:
        means[label] = features[labels == label].mean(axis=0)
    means[np.setdiff1d(np.arange(classes), present)] = np.inf  # nothing is near a class nobody has seen
    within = np.maximum(((features - means[labels]) ** 2).mean(axis=0), _LEAST_VARIANCE)
    far = _distances(embedding, means, within)
    answers = np.bincount(chances.argmax(axis=1), minlength=classes) / len(chances)
    return Baseline(
        class_means=means,
        within=within.astype(np.float32),
        mean=embedding.mean(axis=0),
        variance=np.maximum(embedding.var(axis=0), _LEAST_VARIANCE),
        rates=answers.astype(np.float32),
        confidence=np.sort(chances.max(axis=1)).astype(np.float32),
        brightness=np.sort(brightness).astype(np.float32),
        distance=np.sort(far).astype(np.float32),
    )


def distances(embedding: Floats, baseline: Baseline) -> npt.NDArray[np.float64]:
    """`float64[N]`: how far embeddings `[N, D]` are from the nearest class.

    Root mean square over the features of (z - mean of the class) / sqrt(variance within classes): the
    Mahalanobis distance of Lee et al. 2018 with a diagonal covariance; about 1 for an image like those that
    were learned.
    """
    return _distances(embedding, baseline.class_means, baseline.within)


def write_baseline(file: Path, baseline: Baseline) -> None:
    """As a compressed .npz of the arrays."""
    np.savez_compressed(file, **{field.name: getattr(baseline, field.name) for field in fields(baseline)})


def read_baseline(file: Path) -> Baseline:
    """`BundleError` where the file is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return Baseline(**{field.name: arrays[field.name] for field in fields(Baseline)})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(f"unreadable baseline ({error})", where=file, fix="restore the bundle") from error


def open_baseline(bundle: Bundle) -> Baseline | None:
    """That of a bundle; None where it has none, as those made before there were any."""
    file = bundle.payload("baseline")
    if file is None:
        return None
    baseline = read_baseline(file)
    if len(baseline.class_means) != len(bundle.manifest.classes):
        raise BundleError("its baseline is of other classes", where=file, fix="restore the bundle")
    return baseline


def _distances(embedding: Floats, means: Floats, within: Floats) -> npt.NDArray[np.float64]:
    # |z - m|^2 over all classes as one matrix product
    scale = 1 / np.sqrt(within)
    points = (embedding * scale).astype(np.float64)
    seen = np.isfinite(means).all(axis=1)
    centres = (means[seen] * scale).astype(np.float64)
    squared = (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)[None]
    nearest = np.maximum(squared.min(axis=1), 0.0)
    return np.asarray(np.sqrt(nearest / embedding.shape[1]), dtype=np.float64)
