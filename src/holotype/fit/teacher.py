"""A teacher: another bundle's network, which answers for the very pixels that the student sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from holotype.bundle import open_bundle
from holotype.config import DistillConfig
from holotype.dataset import Shape
from holotype.errors import BundleError, ConfigError
from holotype.models import Architecture, Classifier, build, recipe_of

__all__ = ["Teacher", "open_teacher"]


@dataclass(frozen=True)
class Teacher:
    """A frozen network and, for each of the student's classes, the place of that class in its answer."""

    classifier: Classifier
    places: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `float32[N, C]` of `uint8[N, H, W, 3]`, in the student's order of classes.

        The images are the student's, augmented and mixed (Beyer et al. 2022, Knowledge distillation: a good
        teacher is patient and consistent); the network normalises them its own way.
        """
        logits: torch.Tensor = self.classifier(images)[0]
        return logits.float()[:, self.places]


def open_teacher(
    config: DistillConfig, *, classes: Sequence[str], size: Shape, device: torch.device
) -> Teacher | None:
    """The teacher that `config` names, a bundle or a run folder; None where it names none.

    It may know more classes than the student. `ConfigError` where it lacks one of `classes`, or takes no
    images of `size`: nothing but the pixel path resizes. `BundleError` where it is no bundle with weights.
    """
    if config.teacher is None:
        return None
    bundle = open_bundle(config.teacher)
    known = bundle.manifest.classes
    lacking = [name for name in classes if name not in known]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ConfigError(
            f"the teacher does not know the class {lacking[0]!r}{more}",
            where=f"distill.teacher={config.teacher}",
            fix="choose one that was trained on all classes of this dataset",
        )
    file, weights = bundle.payload("architecture"), bundle.payload("weights")
    if file is None or weights is None:
        raise BundleError(
            "has no torch weights to learn from", where=bundle.path, fix="use one that train wrote"
        )
    architecture = Architecture.model_validate_json(file.read_text())
    own = Shape(architecture.height, architecture.width)
    if recipe_of(architecture.name).fixed_size and own != size:
        raise ConfigError(
            f"the teacher takes images of {own.height}x{own.width} pixels only, training shows it"
            f" {size.height}x{size.width}",
            where=f"distill.teacher={config.teacher}",
            fix=f"use --set data.size={own.height} --set fit.scale=1, or another teacher",
        )
    classifier = build(architecture, weights).requires_grad_(False)
    return Teacher(
        classifier.to(device).to(memory_format=torch.channels_last),
        torch.tensor([known.index(name) for name in classes], device=device),
    )
