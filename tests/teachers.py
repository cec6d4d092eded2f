"""Bundles that a network can learn from."""

from __future__ import annotations

from pathlib import Path

import torch

from holotype.bundle import Bundle, Manifest, write_bundle
from holotype.models import Architecture, create, recipe_of, save_weights
from holotype.preprocess import Preprocess


def write_teacher(folder: Path, name: str, *, side: int, classes: tuple[str, ...]) -> Bundle:
    """A bundle at `folder/run/best` as train writes it, of a small network with random weights."""
    torch.manual_seed(0)
    recipe = recipe_of(name)
    architecture = Architecture(
        name=name, classes=len(classes), height=side, width=side, mean=recipe.mean, std=recipe.std,
        dropout=0.5,
    )  # fmt: skip
    (folder / "run").mkdir()
    file, weights = folder / "architecture.json", folder / "weights.safetensors"
    file.write_text(architecture.model_dump_json())
    save_weights(create(architecture), weights)
    manifest = Manifest(classes=classes, preprocess=Preprocess(height=side, width=side))
    return write_bundle(folder / "run" / "best", manifest, files={"architecture": file, "weights": weights})
