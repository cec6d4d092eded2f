"""Stage 1 of training: features of the frozen backbone, computed once, and a linear head fitted on them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from holotype.config import FitConfig
from holotype.metrics import confusion_matrix, log_loss, macro_f1
from holotype.policy import Policy, probabilities
from holotype.preprocess import Pixels
from holotype.progress import track
from holotype.runlog import RunLog
from holotype.runtime import Runtime

__all__ = [
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

# Strengths of the L2 penalty, from the strongest: each solution starts the next fit.
_PENALTIES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


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
    """What an epoch is judged by, on validation."""

    log_loss: float
    accuracy: float
    macro_f1: float


def score_logits(logits: Floats, labels: Labels) -> Scores:
    """Scores of `float32[N, C]` logits at temperature 1."""
    chances = probabilities(logits, policy=Policy())
    matrix = confusion_matrix(labels, chances.argmax(axis=1).astype(np.int64), classes=logits.shape[1])
    return Scores(
        log_loss=log_loss(labels, chances),
        accuracy=float(np.trace(matrix) / matrix.sum()),
        macro_f1=float(macro_f1(matrix[None])[0]),
    )


def better(new: Scores, old: Scores | None, *, metric: str) -> bool:
    """Whether `new` beats `old` by `metric`; equal accuracies or F1s are decided by the log loss."""
    if old is None:
        return True
    if metric == "log_loss":
        return new.log_loss < old.log_loss
    before, after = getattr(old, metric), getattr(new, metric)
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
    train: Features, validation: Features, *, classes: int, config: FitConfig, log: RunLog
) -> HeadFit:
    """Multinomial logistic regression by L-BFGS (Liu & Nocedal 1989) on standardised features.

    Minimises smoothed cross-entropy + l2 / 2 * |W|^2 for each of six l2, and keeps the one that is best on
    validation by `config.metric`. Standardisation is folded into the returned weight and bias.
    """
    problem = _Standardised.of(train, classes=classes)
    best: HeadFit | None = None
    for epoch, l2 in enumerate(_PENALTIES, start=1):
        start = time.perf_counter()
        loss, norm, logits = _minimise(problem, l2=l2, smoothing=config.label_smoothing)
        folded, offset = problem.folded()
        seen = validation.values @ folded.numpy().T + offset.numpy()
        scores = score_logits(seen, validation.labels)
        accuracy = float((logits.argmax(1) == problem.targets).float().mean())
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
    problem = _Standardised.of(train, classes=classes)
    for l2 in penalties:
        _minimise(problem, l2=l2, smoothing=smoothing)
        weight, bias = problem.folded()
        yield inputs @ weight.numpy().T + bias.numpy()


def validation_columns(scores: Scores) -> dict[str, float]:
    return {
        "validation_loss": scores.log_loss,
        "validation_accuracy": scores.accuracy,
        "validation_macro_f1": scores.macro_f1,
    }


@dataclass(frozen=True)
class _Standardised:
    """Features of mean 0 and deviation 1, their targets, and the head that is fitted to them in place."""

    mean: Floats
    scale: Floats
    inputs: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, features: Features, *, classes: int) -> _Standardised:
        mean, scale = features.values.mean(axis=0), features.values.std(axis=0) + 1e-6
        return cls(
            mean,
            scale,
            torch.from_numpy((features.values - mean) / scale),
            torch.from_numpy(features.labels),
            torch.zeros(classes, features.values.shape[1], requires_grad=True),
            torch.zeros(classes, requires_grad=True),
        )

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias for features as they come."""
        weight = self.weight.detach() / torch.from_numpy(self.scale)
        return weight, self.bias.detach() - weight @ torch.from_numpy(self.mean)


def _minimise(problem: _Standardised, *, l2: float, smoothing: float) -> tuple[float, float, torch.Tensor]:
    """Run L-BFGS in place; returns the cross-entropy, the final gradient norm, and the logits."""
    inputs, targets, weight, bias = problem.inputs, problem.targets, problem.weight, problem.bias
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=60, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weight.T + bias, targets, label_smoothing=smoothing)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    closure()
    gradients = [parameter.grad for parameter in (weight, bias) if parameter.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    with torch.no_grad():
        logits = inputs @ weight.T + bias
        loss = functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    return float(loss), norm, logits


def batches_of(rows: Labels, *, size: int) -> Iterator[Labels]:
    """Consecutive slices of `rows` of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
