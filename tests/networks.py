"""Small networks with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from holotype.models import Architecture, Classifier, create
from holotype.preprocess import Pixels


def small_network(
    name: str = "test_resnet", *, side: int = 32, classes: int = 3, **options: Any
) -> Classifier:
    """For images `uint8[N, side, side, 3]`, whose values it maps to -1..1."""
    architecture = Architecture(
        name=name, classes=classes, height=side, width=side, mean=(0.5,) * 3, std=(0.5,) * 3, **options
    )
    return create(architecture)


def taught_network(name: str, images: Pixels, labels: list[int]) -> Classifier:
    """A small network with biases everywhere that was trained on `uint8[N, S, S, 3]` for a moment."""
    torch.manual_seed(0)
    network = small_network(name, side=images.shape[1], classes=max(labels) + 1).eval()
    with torch.no_grad():
        for key, value in network.network.named_parameters():
            # Also scales of residual branches, and positions: timm begins with 0 or 1e-6.
            if value.ndim == 1 or "embed" in key or "token" in key:
                value.add_(0.1 * torch.randn(value.shape))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    pixels, wanted = torch.from_numpy(images), torch.tensor(labels)
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(network(pixels)[0], wanted).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network
