"""`holotype hard-samples`: the images a model does worst on, and the training images nearest to each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.bundle import home_of, write_text
from holotype.config import HardSamplesConfig
from holotype.dataset import Dataset, Split, dataset_name, open_for, thumbnailer
from holotype.embeddings import embed, embeddings_of
from holotype.errors import ConfigError, DatasetError, require
from holotype.hard_samples.contract import COLUMNS, HardSample, HardSamples, Neighbour, to_csv
from holotype.hard_samples.page import write_page
from holotype.metrics import Predictions
from holotype.predictor import Predictor, load
from holotype.preprocess import Pixels
from holotype.report import BundleSummary
from holotype.scoring import choose_split, score

__all__ = ["COLUMNS", "HardSample", "HardSamples", "Neighbour", "hard_samples"]

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_Near = tuple[tuple[Neighbour, ...], ...]


def hard_samples(
    target: Path | str,
    data: Path | str | None = None,
    *,
    config: HardSamplesConfig | None = None,
    out: Path | str | None = None,
    device: str = "auto",
) -> HardSamples:
    """List the images of a split with the highest loss, and the nearest training images by embedding.

    `data` defaults to what the bundle was trained on. Writes a CSV (see `to_csv`) to `out`, by default
    `hard-samples-DATA-SPLIT.csv` beside the bundle, and a page for people with the same name but .html.
    Nearest is exact, by the cosine of the bundle's own embeddings, which are kept in the data's cache folder.
    """
    config = config or HardSamplesConfig()
    if out is not None and Path(out).suffix.lower() != ".csv":
        raise ConfigError("is no name for a list", where=out, fix="name it .csv")
    require("jinja2", extra="train", purpose="the page of hard samples")
    predictor = load(target, runtime=config.runtime, device=device)
    dataset = open_for(predictor.bundle, data, config=config.data)
    source = dataset.source
    split = choose_split(dataset, wanted=config.split)
    if not len(dataset.rows("train")):
        raise DatasetError("has no train split to find neighbours in", where=source, fix="name other data")
    predictions = score(predictor, dataset, split=split)
    losses = _losses(predictions)
    hardest = np.argsort(-losses, kind="stable")[: config.count]
    embeddings = embed(dataset, backbone=_Embedding(predictor))
    near = _neighbours(dataset, embeddings, dataset.rows(split)[hardest], count=config.neighbours)
    file = Path(out) if out is not None else _default_file(Path(target), source, split)
    result = HardSamples(
        bundle=BundleSummary(hash=predictor.bundle.hash, path=str(predictor.bundle.path)),
        dataset=str(source),
        split=split,
        images=len(losses),
        file=str(file),
        page=str(file.with_suffix(".html")),
        samples=tuple(
            _sample(predictions, row, loss=losses[row], near=both)
            for row, both in zip(hardest, near, strict=True)
        ),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, to_csv(result))
    write_page(Path(result.page), result, thumbnail=thumbnailer(dataset))
    return result


def _default_file(target: Path, source: Path, split: Split) -> Path:
    return home_of(target) / f"hard-samples-{dataset_name(source)}-{split}.csv"


@dataclass(frozen=True)
class _Embedding:
    """A bundle as what `embed` asks: a key for what it has computed, and embeddings of pixels."""

    predictor: Predictor

    @property
    def key(self) -> str:
        return self.predictor.bundle.hash[:16]

    def __call__(self, images: Pixels) -> Floats:
        return embeddings_of(self.predictor.runtime, images)


def _losses(predictions: Predictions) -> npt.NDArray[np.float64]:
    """`float64[N]`: -ln p(label) of each image, p clipped to [1e-12, 1]."""
    chosen = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
    return np.abs(np.log(np.clip(chosen, 1e-12, 1)))


def _neighbours(dataset: Dataset, embeddings: Floats, rows: Rows, *, count: int) -> list[_Near]:
    """The nearest training images of each of `rows`, never itself: of any label, of its own, of others."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    training = dataset.rows("train")
    likeness = unit[rows] @ unit[training].T
    likeness[rows[:, None] == training] = -np.inf
    same = dataset.labels(rows)[:, None] == dataset.labels(training)
    kinds = (likeness, np.where(same, likeness, -np.inf), np.where(same, -np.inf, likeness))
    return [
        tuple(_nearest(dataset, training, row, count=count) for row in of_kinds)
        for of_kinds in zip(*kinds, strict=True)
    ]


def _nearest(dataset: Dataset, rows: Rows, likeness: Floats, *, count: int) -> tuple[Neighbour, ...]:
    """Up to `count` of `rows` with the largest cosines `float32[N]`, -inf being none."""
    order = np.argsort(-likeness, kind="stable")[:count]
    best = order[likeness[order] > -np.inf]
    labels = (dataset.classes[label] for label in dataset.labels(rows[best]))
    return tuple(
        Neighbour(path=path, label=label, similarity=cosine)
        for path, label, cosine in zip(
            dataset.paths(rows[best]), labels, np.clip(likeness[best], -1, 1).tolist(), strict=True
        )
    )


def _sample(predictions: Predictions, row: int, *, loss: float, near: _Near) -> HardSample:
    chances, label, said = predictions.probabilities[row], predictions.labels[row], predictions.predicted[row]
    return HardSample(
        path=predictions.paths[row],
        label=predictions.classes[label],
        predicted=predictions.classes[said],
        loss=loss,
        margin=float(chances[label] - np.delete(chances, label).max()),
        label_probability=float(chances[label]),
        probability=float(chances[said]),
        neighbours=near[0],
        same_label=near[1],
        other_label=near[2],
    )
