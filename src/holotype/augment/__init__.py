"""Augmentation of a batch on the training device, its parameters drawn per (seed, epoch, image)."""

from holotype.augment.chain import augment
from holotype.augment.draws import Draws, draw
from holotype.augment.mixing import Mix, draw_mix, mix, mix_targets
from holotype.augment.picture import draw_training_batch, mixed_captions
from holotype.augment.samples import Samples

__all__ = [
    "Draws",
    "Mix",
    "Samples",
    "augment",
    "draw",
    "draw_mix",
    "draw_training_batch",
    "mix",
    "mix_targets",
    "mixed_captions",
]
