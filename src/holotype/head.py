"""Stage 1 of training: features of the frozen backbone, computed once, and a linear head fitted on them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
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
    mean, scale = train.values.mean(axis=0), train.values.std(axis=0) + 1e-6
    inputs = torch.from_numpy((train.values - mean) / scale)
    targets = torch.from_numpy(train.labels)
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    best: HeadFit | None = None
    for epoch, l2 in enumerate(_PENALTIES, start=1):
        start = time.perf_counter()
        loss, norm, logits = _minimise(weight, bias, inputs, targets, l2=l2, smoothing=config.label_smoothing)
        folded = weight.detach() / torch.from_numpy(scale)
        offset = bias.detach() - folded @ torch.from_numpy(mean)
        seen = validation.values @ folded.numpy().T + offset.numpy()
        scores = score_logits(seen, validation.labels)
        accuracy = float((logits.argmax(1) == targets).float().mean())
        log.add(
            {"stage": "head", "epoch": epoch, "l2": l2, "train_loss": loss, "train_accuracy": accuracy,
             "gradient_norm": norm, **validation_columns(scores)},
            {"stage": "head", "epoch": epoch, "seconds": time.perf_counter() - start},
        )  # fmt: skip
        if better(scores, None if best is None else best.scores, metric=config.metric):
            best = HeadFit(folded.clone(), offset.clone(), scores, seen)
    if best is None:
        raise AssertionError("no penalty was tried")
    return best


def validation_columns(scores: Scores) -> dict[str, float]:
    return {
        "validation_loss": scores.log_loss,
        "validation_accuracy": scores.accuracy,
        "validation_macro_f1": scores.macro_f1,
    }


def _minimise(
    weight: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    l2: float,
    smoothing: float,
) -> tuple[float, float, torch.Tensor]:
    """Run L-BFGS in place; returns the cross-entropy, the final gradient norm, and the logits."""
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
