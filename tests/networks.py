"""Small networks with random weights."""

from __future__ import annotations

from typing import Any

from holotype.models import Architecture, Classifier, create


def small_network(
    name: str = "test_resnet", *, side: int = 32, classes: int = 3, **options: Any
) -> Classifier:
    """For images `uint8[N, side, side, 3]`, whose values it maps to -1..1."""
    architecture = Architecture(
        name=name, classes=classes, height=side, width=side, mean=(0.5,) * 3, std=(0.5,) * 3, **options
    )
    return create(architecture)
