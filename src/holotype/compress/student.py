"""A smaller network that learns from the bundle's answers (Hinton et al. 2015, Distilling the Knowledge)."""

from __future__ import annotations

from pathlib import Path

from holotype.compress.recovery import open_recovery, recover, teach
from holotype.config import ModelConfig, StudentConfig, TrainConfig
from holotype.errors import ModelError
from holotype.fit import Learned, Session, open_session
from holotype.models import Classifier, create, recipe_of

__all__ = ["open_student", "teach_student"]

# Own network, smaller images: half the work, and a step that ImageNet recipes take too (224 → 160).
_SMALLER = 5 / 7
_GRID = 32


def open_student(
    data: Path, network: Classifier, config: TrainConfig, student: StudentConfig, *, folder: Path, device: str
) -> Session:
    """A session of the network that `student` names; or of `network` itself, on smaller images.

    `config` is how `network` would be trained. `ModelError` where `network` cannot read smaller images, or
    the weights of the other one cannot be had.
    """
    if student.name is None:
        small = _on_smaller_images(network, student.size)
        sized = _with_size(config, small.architecture.height)
        return open_recovery(data, small, sized, folder=folder, device=device)
    # Another network: what was settled for the bundle's own, and fits no other, is settled anew.
    model = ModelConfig(name=student.name, weights=student.weights)
    fit = config.fit.model_copy(update={"freeze_norm": "auto"})
    config = config.model_copy(update={"model": model, "fit": fit})
    if student.size is not None:
        config = _with_size(config, student.size)
    folder.mkdir(parents=True, exist_ok=True)
    return open_session(data, config, device=device, folder=folder)


def teach_student(session: Session) -> Learned:
    """Train it: from the weights it has where it knows the classes, else from a head on its features."""
    return recover(session) if session.origin == "given" else teach(session)


def _on_smaller_images(network: Classifier, size: int | None) -> Classifier:
    architecture = network.architecture
    own = architecture.height
    side = size or max(round(own * _SMALLER / _GRID), 1) * _GRID
    if recipe_of(architecture.name).fixed_size:
        raise ModelError("reads images of one size only: name a student (--set student.name=...)")
    if side >= own:
        raise ModelError(f"reads images of {own} pixels already: {side} are not smaller")
    small = create(architecture.model_copy(update={"height": side, "width": side}))
    small.network.load_state_dict(network.network.state_dict())
    return small


def _with_size(config: TrainConfig, side: int) -> TrainConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"size": side})})
