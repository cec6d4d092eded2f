"""`holotype explain`: where a network saw the evidence for a class, in confused images or given ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holotype.bundle import Bundle, home_of, open_bundle, write_text
from holotype.config import ExplainConfig
from holotype.dataset import Dataset, Split, dataset_name, open_for
from holotype.errors import ConfigError, DatasetError, ImageError, require
from holotype.explain.contract import ConfusedClasses, Evidence, Explanation, Shown
from holotype.explain.page import Group, write_page, write_picture
from holotype.metrics import Predictions, confusion_matrix, most_confused
from holotype.models import Classifier, choose_device, open_network
from holotype.predictor import Predictor, load
from holotype.preprocess import Limits, Pixels
from holotype.progress import track
from holotype.report import BundleSummary, UnreadableFile
from holotype.saliency import heat_maps, overlay
from holotype.scoring import choose_split, score

__all__ = ["ConfusedClasses", "Evidence", "Explanation", "Shown", "explain"]

Rows = npt.NDArray[np.int64]

_MOST = 200
"""Images on one page; each weighs about 50 kB."""


@dataclass(frozen=True)
class _Network:
    """A bundle twice: as what answers, and as what has gradients."""

    predictor: Predictor
    classifier: Classifier


@dataclass(frozen=True)
class _Judged:
    """A split, its rows, and what the network said about them."""

    network: _Network
    dataset: Dataset
    rows: Rows
    predictions: Predictions


def explain(
    target: Path | str,
    paths: Sequence[Path | str] = (),
    *,
    data: Path | str | None = None,
    config: ExplainConfig | None = None,
    out: Path | str | None = None,
    device: str = "auto",
) -> Explanation:
    """Draw Grad-CAM for the most confused classes of a split, or for the two best classes of image files.

    `data` defaults to what the bundle was trained on. Writes explain.html, explain.png and explain.json into
    `out`; by default beside the bundle, in `explain-DATA-SPLIT` or `explain-images`. `BundleError` where it
    has no torch weights, `ModelError` where its network has no features to draw over.
    """
    config = config or ExplainConfig()
    if paths and data is not None:
        raise ConfigError("give images or --data, not both", where=data)
    for library in ("matplotlib", "jinja2"):
        require(library, extra="train", purpose="drawing an explanation")
    network = _open(Path(target), config, device=device)
    bundle = network.predictor.bundle
    if paths:
        folder = Path(out) if out is not None else home_of(target) / "explain-images"
        explanation, groups = _named(network, [str(path) for path in paths], folder=folder)
    else:
        dataset = open_for(bundle, data, config=config.data)
        split = choose_split(dataset, wanted=config.split)
        named = f"explain-{dataset_name(dataset.source)}-{split}"
        folder = Path(out) if out is not None else home_of(target) / named
        explanation, groups = _confused(network, dataset, split, config=config, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "explain.json", explanation.model_dump_json(indent=1) + "\n")
    write_picture(Path(explanation.picture), groups)
    write_page(Path(explanation.page), explanation, groups)
    return explanation


def _open(target: Path, config: ExplainConfig, *, device: str) -> _Network:
    bundle = open_bundle(target)
    files = bundle.network_files(
        purpose=", whose gradients say where the evidence is",
        fix="explain the bundle that holotype train wrote",
    )
    chosen = choose_device(device)
    classifier = open_network(*files).to(chosen)
    predictor = load(
        bundle.path,
        runtime="auto" if chosen.type == "cpu" else "torch",  # on a CPU others are several times as fast
        device=str(chosen),
        limits=Limits(max_pixels=config.data.max_pixels),
    )
    return _Network(predictor, classifier)


def _named(network: _Network, paths: Sequence[str], *, folder: Path) -> tuple[Explanation, list[Group]]:
    """The two most probable classes of each file that can be read."""
    if len(paths) > _MOST:
        raise ConfigError(f"{len(paths)} images do not fit on a page", fix=f"name at most {_MOST}")
    predictor = network.predictor
    images: dict[str, Pixels] = {}
    unreadable = []
    for path in paths:
        try:
            images[path] = predictor.read(path)
        except ImageError as error:
            unreadable.append(UnreadableFile(path=path, error=str(error)))
        except OSError as error:
            unreadable.append(UnreadableFile(path=path, error=f"cannot be read ({error.strerror})"))
    if not images:
        raise DatasetError(unreadable[0].error, where=unreadable[0].path, fix="name images that can be read")
    pixels = np.stack(list(images.values()))
    size = predictor.batch_size
    chances = np.concatenate(
        [predictor.probabilities(pixels[at : at + size]) for at in range(0, len(pixels), size)]
    )
    targets = np.argsort(-chances, axis=1, kind="stable")[:, :2].astype(np.int64)
    shown = tuple(
        _shown(path, row, two, classes=predictor.classes, label=None)
        for path, row, two in zip(images, chances, targets, strict=True)
    )
    explanation = Explanation(
        **_places(predictor.bundle, folder), images=len(images), named=shown, unreadable=tuple(unreadable)
    )
    return explanation, [Group(None, None, shown, _panels(network.classifier, pixels, targets))]


def _confused(
    network: _Network, dataset: Dataset, split: Split, *, config: ExplainConfig, folder: Path
) -> tuple[Explanation, list[Group]]:
    """For each pair of classes: the first taken for the second, the second for the first, and each right."""
    judged = _Judged(network, dataset, dataset.rows(split), score(network.predictor, dataset, split=split))
    predictions, names = judged.predictions, judged.predictions.classes
    matrix = confusion_matrix(predictions.labels, predictions.predicted, classes=len(names))
    found = most_confused(np.triu(matrix + matrix.T), limit=config.pairs)
    if not found:
        raise DatasetError(
            f"no image of its {split} split is taken for another class",
            where=dataset.source,
            fix="use another --split, or name images: holotype explain TARGET PATHS",
        )
    groups: list[Group] = []
    pairs = []
    with track("drawing the evidence", total=len(found)) as progress:
        for a, b, _ in found:
            wrong = [_group(judged, cell, other=cell[1], limit=config.images) for cell in ((a, b), (b, a))]
            right = [_group(judged, (i, i), other=j, limit=config.images) for i, j in ((a, b), (b, a))]
            groups += wrong + right
            pairs.append(
                ConfusedClasses(
                    classes=(names[a], names[b]),
                    counts=(int(matrix[a, b]), int(matrix[b, a])),
                    images=(int(matrix[a].sum()), int(matrix[b].sum())),
                    wrong=(wrong[0].shown, wrong[1].shown),
                    right=(right[0].shown, right[1].shown),
                )
            )
            progress.advance()
    explanation = Explanation(
        **_places(network.predictor.bundle, folder),
        dataset=str(dataset.source),
        split=split,
        images=len(predictions.labels),
        mistakes=int((predictions.labels != predictions.predicted).sum()),
        pairs=tuple(pairs),
    )
    return explanation, groups


def _group(judged: _Judged, cell: tuple[int, int], *, other: int, limit: int) -> Group:
    """The most certain images of a cell (label, said) of the confusion matrix, and evidence for `other`."""
    predictions, (label, said) = judged.predictions, cell
    inside = np.flatnonzero((predictions.labels == label) & (predictions.predicted == said))
    certain = np.argsort(-predictions.probabilities[inside, said], kind="stable")
    chosen = inside[certain][:limit]
    targets = np.tile(np.array([[label, other]], dtype=np.int64), (len(chosen), 1))
    names = predictions.classes
    shown = tuple(
        _shown(predictions.paths[i], predictions.probabilities[i], two, classes=names, label=names[label])
        for i, two in zip(chosen, targets, strict=True)
    )
    (pixels,) = judged.dataset.pixels([judged.rows[chosen]])
    return Group(names[label], names[said], shown, _panels(judged.network.classifier, pixels, targets))


def _shown(
    path: str, chances: npt.NDArray[np.float64], targets: Rows, *, classes: Sequence[str], label: str | None
) -> Shown:
    first, second = (Evidence(label=classes[i], probability=chances[i]) for i in targets.tolist())
    return Shown(path=path, label=label, predicted=classes[int(chances.argmax())], evidence=(first, second))


def _panels(classifier: Classifier, images: Pixels, targets: Rows) -> Pixels:
    """`uint8[N, 3, H, W, 3]`: each image, and over it the evidence for its two `targets: int64[N, 2]`."""
    maps = [overlay(images, heat_maps(classifier, images, targets[:, i])) for i in (0, 1)]
    return np.stack([images, *maps], axis=1)


def _places(bundle: Bundle, folder: Path) -> dict[str, Any]:
    return {
        "bundle": BundleSummary(hash=bundle.hash, path=str(bundle.path)),
        "page": str(folder / "explain.html"),
        "picture": str(folder / "explain.png"),
    }
