"""Stage 1 of training: features of the frozen backbone, computed once, and a linear head fitted on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from holotype.config import FitConfig
from holotype.errors import TrainingError
from holotype.imbalance import class_weights, settle, shown_counts
from holotype.loss import criterion
from holotype.metrics import confusion_matrix, expected_calibration_error, log_loss, macro_f1, per_class
from holotype.policy import Policy, probabilities
from holotype.preprocess import Pixels
from holotype.progress import track
from holotype.runlog import RunLog
from holotype.runtime import Runtime

__all__ = [
    "LOWER_IS_BETTER",
    "Features",
    "HeadFit",
    "Scores",
    "batches_of",
    "better",
    "extract_features",
    "fit_head",
    "logistic_path",
    "score_logits",
    "validation_columns",
]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
_Loss = Callable[[torch.Tensor], torch.Tensor]

LOWER_IS_BETTER = frozenset({"log_loss", "ece"})
"""Metrics of which less is better."""

# Strengths of the L2 penalty, from the strongest: each solution starts the next fit.
_PENALTIES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)

# Changes of the loss at which a fit ends. The first leaves it within 1e-4 of the minimum, which moves
# accuracies on validation by an image or two; who compares single images wants the minimum itself.
_GOOD, _EXACT = 1e-5, 1e-6


@dataclass(frozen=True)
class Features:
    """Embeddings `float32[N, D]` of images, with labels `int64[N]`."""

    values: Floats
    labels: Labels


@dataclass(frozen=True)
class HeadFit:
    """The best head: weight `float32[C, D]`, bias `float32[C]`, and how good it is on validation."""

    weight: torch.Tensor
    bias: torch.Tensor
    scores: Scores
    logits: Floats


@dataclass(frozen=True)
class Scores:
    """What an epoch is judged by, on validation: a field for each `fit.metric`."""

    log_loss: float
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    weighted_f1: float
    ece: float


def score_logits(logits: Floats, labels: Labels) -> Scores:
    """Scores of `float32[N, C]` logits at temperature 1."""
    chances = probabilities(logits, policy=Policy())
    matrix = confusion_matrix(labels, chances.argmax(axis=1).astype(np.int64), classes=logits.shape[1])
    by_class = [found for found in per_class(matrix) if found.support]
    return Scores(
        log_loss=log_loss(labels, chances),
        accuracy=float(np.trace(matrix) / matrix.sum()),
        balanced_accuracy=float(np.mean([found.recall for found in by_class])),
        macro_f1=float(macro_f1(matrix[None])[0]),
        weighted_f1=float(np.average([f.f1 for f in by_class], weights=[f.support for f in by_class])),
        ece=expected_calibration_error(labels, chances),
    )


def better(new: Scores, old: Scores | None, *, metric: str) -> bool:
    """Whether `new` beats `old` by `metric`: log loss and ECE the lower, the rest the higher.

    What is equal by the metric is decided by the log loss.
    """
    if old is None:
        return True
    before, after = getattr(old, metric), getattr(new, metric)
    if metric in LOWER_IS_BETTER:
        before, after = -before, -after
    return bool(after > before or (after == before and new.log_loss < old.log_loss))


def extract_features(
    runtime: Runtime, batches: Iterable[Pixels], labels: Labels, *, mirror: bool, label: str
) -> Features:
    """Embed every batch, and with `mirror` also its mirror image; all originals come first."""
    total = len(labels) * (2 if mirror else 1)
    straight: list[Floats] = []
    mirrored: list[Floats] = []
    with track(label, total=total) as progress:
        for images in batches:
            straight.append(runtime.run(images).embedding)
            if mirror:
                mirrored.append(runtime.run(np.ascontiguousarray(images[:, :, ::-1])).embedding)
            progress.advance(len(images) * (2 if mirror else 1))
    return Features(np.concatenate(straight + mirrored), np.concatenate([labels] * (2 if mirror else 1)))


def fit_head(
    train: Features,
    validation: Features,
    *,
    classes: int,
    config: FitConfig,
    log: RunLog,
    names: Sequence[str] = (),
    weights: npt.NDArray[np.float64] | None = None,
) -> HeadFit:
    """Multinomial logistic regression by L-BFGS (Liu & Nocedal 1989) on features of about equal size.

    Minimises the mean loss + l2 / 2 * |W|^2 for each of six l2, and keeps the one that is best on validation
    by `config.metric`. The loss is that of fine-tuning, with the same remedy against unequal classes; `names`
    of the classes are needed where `config.focal_alpha` goes by name. `weights: float64[N]` say how often
    each of N images is shown in an epoch (mirrored twins have those of theirs): here they weigh its loss,
    which is what drawing comes to in expectation. None is each once, or as the sampler draws.
    Features are centred and divided by sqrt(s^2 + m^2) of their deviation s and the median m of all, so that
    one that is almost always the same is not blown up; that is folded into the returned weight and bias.
    """
    loss_of = _mean_loss(train.labels, classes=classes, config=config, names=names, weights=weights)
    problem = _Standardised.of(train, classes=classes, rounded=True)
    best: HeadFit | None = None
    for epoch, l2 in enumerate(_PENALTIES, start=1):
        start = time.perf_counter()
        loss, norm, logits = _minimise(problem, loss_of, l2=l2, tolerance=_GOOD)
        folded, offset = problem.folded()
        seen = validation.values @ folded.numpy().T + offset.numpy()
        scores = score_logits(seen, validation.labels)
        accuracy = float((logits.argmax(1).numpy() == train.labels).mean())
        log.add(
            {"stage": "head", "epoch": epoch, "l2": l2, "train_loss": loss, "train_accuracy": accuracy,
             "gradient_norm": norm, **validation_columns(scores)},
            {"stage": "head", "epoch": epoch, "seconds": time.perf_counter() - start},
        )  # fmt: skip
        if better(scores, None if best is None else best.scores, metric=config.metric):
            best = HeadFit(folded, offset, scores, seen)
    if best is None:
        raise AssertionError("no penalty was tried")
    return best


def logistic_path(
    train: Features, inputs: Floats, *, classes: int, penalties: Sequence[float], smoothing: float = 0.0
) -> Iterator[Floats]:
    """Logits `float32[N, C]` of `inputs: float32[N, D]` by the regression of `fit_head`, for each penalty.

    From the strongest penalty to the weakest, each solution starts the next fit.
    """
    problem = _Standardised.of(train, classes=classes, rounded=False)
    loss_of = _cross_entropy(train.labels, smoothing=smoothing, weights=None)
    for l2 in penalties:
        _minimise(problem, loss_of, l2=l2, tolerance=_EXACT)
        weight, bias = problem.folded()
        yield inputs @ weight.numpy().T + bias.numpy()


def validation_columns(scores: Scores) -> dict[str, float]:
    """The scores under their names in `metrics.csv`."""
    return {f"validation_{'loss' if k == 'log_loss' else k}": v for k, v in asdict(scores).items()}


def _mean_loss(
    labels: Labels,
    *,
    classes: int,
    config: FitConfig,
    names: Sequence[str],
    weights: npt.NDArray[np.float64] | None,
) -> _Loss:
    """The loss that `config` asks for, of the logits of all images with `labels`."""
    counts = np.bincount(labels, minlength=classes)
    remedy = settle(config.imbalance, counts)
    if weights is not None:
        weights = np.tile(weights, len(labels) // len(weights))
    elif remedy == "sampler":
        weights = class_weights(counts)[labels]
    if remedy in ("none", "sampler"):
        return _cross_entropy(labels, smoothing=config.label_smoothing, weights=weights)
    if isinstance(config.focal_alpha, dict) and not names:
        raise AssertionError("weights by name need the names")
    shown = shown_counts(labels, classes=classes, weights=weights)
    losses = criterion(
        config, imbalance=remedy, shown=shown, classes=tuple(names), device=torch.device("cpu")
    )
    targets = functional.one_hot(torch.from_numpy(labels), classes).float()
    often = torch.ones(len(labels)) if weights is None else torch.from_numpy(weights).float()
    return lambda logits: (losses(logits, targets) * often).mean()


def _cross_entropy(labels: Labels, *, smoothing: float, weights: npt.NDArray[np.float64] | None) -> _Loss:
    """As the criterion without a remedy, without the N x C targets that it would need."""
    targets = torch.from_numpy(labels)
    if weights is None:
        return lambda logits: functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    shown = torch.from_numpy(weights).float()
    return lambda logits: (
        functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none") * shown
    ).mean()


@dataclass(frozen=True)
class _Standardised:
    """Features of mean 0 and deviation below 1, and the head that is fitted to them in place.

    With a triangle R what is fitted is `free = W R`, else W itself. R R' is the covariance + 1: features say
    much the same as each other, and in these coordinates the loss is rounder. Down the whole path of
    penalties that takes half the evaluations; it does not pay for the strong ones alone.
    """

    mean: Floats
    scale: Floats
    inputs: torch.Tensor
    triangle: torch.Tensor | None
    free: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, features: Features, *, classes: int, rounded: bool) -> _Standardised:
        mean, deviation = features.values.mean(axis=0), features.values.std(axis=0)
        scale = np.hypot(deviation, np.median(deviation)) + 1e-6
        if not np.isfinite(scale).all():
            raise TrainingError(
                "the backbone answers with what is no number", fix="check the file of model.weights"
            )
        inputs = torch.from_numpy((features.values - mean) / scale)
        count, width = inputs.shape
        triangle = torch.linalg.cholesky(inputs.T @ inputs / count + torch.eye(width)) if rounded else None
        return cls(
            mean,
            scale,
            inputs,
            triangle,
            torch.zeros(classes, width, requires_grad=True),
            torch.zeros(classes, requires_grad=True),
        )

    def weight(self) -> torch.Tensor:
        """`float32[C, D]`, of the scaled features."""
        if self.triangle is None:
            return self.free
        weight: torch.Tensor = torch.linalg.solve_triangular(
            self.triangle, self.free, upper=False, left=False
        )
        return weight

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias for features as they come."""
        weight = self.weight().detach() / torch.from_numpy(self.scale)
        return weight, self.bias.detach() - weight @ torch.from_numpy(self.mean)


def _minimise(
    problem: _Standardised, loss_of: _Loss, *, l2: float, tolerance: float
) -> tuple[float, float, torch.Tensor]:
    """Run L-BFGS in place, until a step changes the loss by less than `tolerance`.

    Returns the loss without the penalty, the final norm of the gradient by what is fitted, and the logits.
    """
    free, bias = problem.free, problem.bias
    optimizer = torch.optim.LBFGS(
        [free, bias], max_iter=60, tolerance_change=tolerance, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        weight = problem.weight()
        loss = loss_of(problem.inputs @ weight.T + bias) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    gradients = [parameter.grad for parameter in (free, bias) if parameter.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    with torch.no_grad():
        logits = problem.inputs @ problem.weight().T + bias
        return float(loss_of(logits)), norm, logits


def batches_of(rows: Labels, *, size: int) -> Iterator[Labels]:
    """Consecutive slices of `rows` of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
