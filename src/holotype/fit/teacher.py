"""A teacher: another bundle's network, which answers for the very pixels that the student sees."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from holotype.bundle import open_bundle
from holotype.config import DistillConfig
from holotype.dataset import Shape
from holotype.errors import ConfigError
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
    config: DistillConfig, *, classes: Sequence[str], sizes: Collection[Shape], device: torch.device
) -> Teacher | None:
    """The teacher that `config` names, a bundle or a run folder; None where it names none.

    It may know more classes than the student. `ConfigError` where it lacks one of `classes`, or takes no
    images of all `sizes`: nothing but the pixel path resizes. `BundleError` where it has no weights.
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
    file, weights = bundle.network_files(purpose=" to learn from", fix="use one that train wrote")
    architecture = Architecture.model_validate_json(file.read_text())
    own = Shape(architecture.height, architecture.width)
    other = next((size for size in sizes if size != own), None)
    if recipe_of(architecture.name).fixed_size and other is not None:
        raise ConfigError(
            f"the teacher takes images of {own.height}x{own.width} pixels only, training shows it"
            f" {other.height}x{other.width}",
            where=f"distill.teacher={config.teacher}",
            fix=f"use --set data.size={own.height} --set fit.scale=1, or another teacher",
        )
    classifier = build(architecture, weights).requires_grad_(False)
    return Teacher(
        classifier.to(device).to(memory_format=torch.channels_last),
        torch.tensor([known.index(name) for name in classes], device=device),
    )
