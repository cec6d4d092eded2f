"""What the network is fed in an epoch: augmented, mixed micro-batches with their targets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from holotype.augment import Samples, augment, draw, draw_mix, mix, mix_targets
from holotype.config import AugmentConfig, FitConfig
from holotype.dataset import Dataset, Shape
from holotype.fit.processes import Processes
from holotype.fit.quarantine import Quarantine
from holotype.fit.sampling import order_epoch, shards

__all__ = ["Batch", "Feed", "feed_epoch"]


@dataclass(frozen=True)
class Feed:
    """Where batches come from: the data, the cached view that crops are taken from, and how they are made."""

    dataset: Dataset
    view: Shape
    augment: AugmentConfig
    fit: FitConfig
    weights: npt.NDArray[np.float64] | None
    micro_batch: int
    quarantine: Quarantine

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """`int64[N]`, the rows that are trained on; asked for at every step."""
        return self.dataset.rows("train")


@dataclass(frozen=True)
class Batch:
    """A part of an optimizer step, on the training device.

    Images `uint8[N, H, W, 3]`; targets `float32[N, C]`, probabilities; weights `float32[N]`, 1 or 0 for
    padding; `shown: int64[M]` are the rows that were read for it, with those that others are mixed with;
    `total` images are in the whole step over all processes; `waited` seconds for the pixels, and `augmented`
    seconds until they were changed and mixed.
    """

    samples: Samples
    shown: npt.NDArray[np.int64]
    images: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    total: int
    last: bool
    waited: float
    augmented: float


def feed_epoch(
    feed: Feed, *, epoch: int, size: Shape, done: int, processes: Processes, device: torch.device
) -> Iterator[Batch]:
    """The batches of this process in an epoch, without its first `done` steps; the same on every call."""
    fit, classes = feed.fit, len(feed.dataset.classes)
    order = order_epoch(
        feed.rows,
        labels=feed.dataset.labels(feed.rows),
        weights=feed.weights,
        seed=fit.seed,
        epoch=epoch,
    )
    steps = shards(
        order,
        batch_size=fit.batch_size,
        processes=processes.count,
        rank=processes.rank,
        micro_batch=feed.micro_batch,
    )[done:]
    parts = [
        (step, part, place + 1 == len(step.parts)) for step in steps for place, part in enumerate(step.parts)
    ]
    mixes = [
        draw_mix(
            feed.augment, seed=fit.seed, epoch=epoch, samples=part.samples, pool=len(order),
            height=size.height, width=size.width,
        )
        for _, part, _ in parts
    ]  # fmt: skip
    partners = [order[mixed.partners] if mixed is not None else None for mixed in mixes]
    wanted = [
        part.samples.rows if other is None else np.concatenate([part.samples.rows, other.rows])
        for (_, part, _), other in zip(parts, partners, strict=True)
    ]
    source = feed.dataset.pixels(wanted, shape=feed.view, instead=feed.quarantine)
    for (step, part, last), rows, mixed, other in zip(parts, wanted, mixes, partners, strict=True):
        start = time.perf_counter()
        pixels = torch.from_numpy(next(source))
        waited = time.perf_counter() - start
        start = _clock(device)

        def shown(samples: Samples, images: torch.Tensor) -> torch.Tensor:
            draws = draw(feed.augment, seed=fit.seed, epoch=epoch, samples=samples)
            return augment(images.to(device), draws, height=size.height, width=size.width)

        def targets(samples: Samples) -> torch.Tensor:
            labels = torch.from_numpy(feed.dataset.labels(samples.rows))
            return torch.nn.functional.one_hot(labels, classes).float().to(device)

        own = len(part.samples)
        images, wished = shown(part.samples, pixels[:own]), targets(part.samples)
        if mixed is not None and other is not None:
            images = mix(images, shown(other, pixels[own:]), mixed)
            wished = mix_targets(wished, targets(other), mixed)
        weights = torch.from_numpy(part.weights).to(device)
        yield Batch(
            part.samples, rows, images, wished, weights, total=step.images, last=last,
            waited=waited, augmented=_clock(device) - start,
        )  # fmt: skip


def _clock(device: torch.device) -> float:
    """Seconds, read when `device` has done what it was told: a GPU computes while we go on."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
