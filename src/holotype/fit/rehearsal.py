"""A training step on a copy of the network, for what is measured before a run: its time, its memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.fit.convolution import faster_convolutions
from holotype.fit.freeze import apply_freezing, training_mode
from holotype.models import Classifier

__all__ = ["example", "forward", "rehearsal", "step"]


@contextmanager
def rehearsal(classifier: Classifier, config: FitConfig, *, device: torch.device) -> Iterator[Classifier]:
    """A copy of `classifier` as it is trained in the last epoch, when the most is unfrozen.

    torch's global generator is left as it was.
    """
    model = copy.deepcopy(classifier).to(device).to(memory_format=torch.channels_last)
    apply_freezing(model, config, epoch=max(config.epochs, 1))
    training_mode(model, freeze_norm=bool(config.freeze_norm))
    with torch.random.fork_rng(devices=[]), faster_convolutions(model):
        yield model


def example(count: int, *, size: Shape, device: torch.device) -> torch.Tensor:
    """`uint8[count, H, W, 3]` of noise."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, size.height, size.width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)


def forward(model: Classifier, images: torch.Tensor, *, precision: str) -> torch.Tensor:
    """Logits `float32[N, C]`."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(images.device.type, dtype=half, enabled=half is not None):
        logits, _ = model(images)
    floats: torch.Tensor = logits.float()
    return floats


def step(model: Classifier, images: torch.Tensor, *, precision: str) -> None:
    """Forward and backward; the gradients stay."""
    forward(model, images, precision=precision).sum().backward()  # type: ignore[no-untyped-call]
    if images.device.type == "cuda":
        torch.cuda.synchronize()
