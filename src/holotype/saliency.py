"""Where in an image a network finds the evidence for a class: Grad-CAM (Selvaraju et al. 2017).

The map is drawn over the network's last features that still have a place in the image: what the head pools
(the last convolution's output, or the last tokens), or, where the head reads nothing but a class token, the
input of the last block, through which the patches reach that token.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from holotype.errors import ModelError
from holotype.models import Classifier
from holotype.preprocess import Pixels

__all__ = ["heat_maps", "overlay"]

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_BATCH = 8


def heat_maps(classifier: Classifier, images: Pixels, targets: Labels) -> Floats:
    """`float32[N, H, W]` in [0, 1]: what speaks for class `targets: int64[N]` in `images: uint8[N, H, W, 3]`.

    ReLU(sum_k w_k A_k), where A_k are channels of features and w_k the mean over all places of the target
    logit's gradient by A_k; upsampled bilinearly and scaled so that the strongest place of each image is 1.
    An image in which nothing speaks for its target is all 0. `classifier` is in evaluation mode and stays as
    it is. `ModelError` for architectures whose features have no places.
    """
    height, width = images.shape[1:3]
    heat = np.empty((len(images), height, width), dtype=np.float32)
    for start in range(0, len(images), _BATCH):
        some = slice(start, start + _BATCH)
        batch = torch.from_numpy(np.ascontiguousarray(images[some])).to(classifier.scale.device)
        wanted = torch.from_numpy(targets[some]).to(batch.device)
        maps = _evidence(classifier, batch, wanted)
        maps = functional.interpolate(maps[:, None], (height, width), mode="bilinear")[:, 0]
        strongest = maps.amax(dim=(1, 2), keepdim=True)
        heat[some] = (maps / torch.where(strongest > 0, strongest, 1)).cpu().numpy()
    return heat


def overlay(images: Pixels, heat: Floats) -> Pixels:
    """`uint8[N, H, W, 3]`: the images in grey, and over them, the more the hotter, the colours of `heat`."""
    from matplotlib import colormaps

    grey = images @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 luma
    colour = 255 * colormaps["inferno"](0.25 + 0.75 * heat)[..., :3].astype(np.float32)
    share = 0.75 * heat[..., None]
    mixed: Pixels = np.rint((1 - share) * grey[..., None] + share * colour).astype(np.uint8)
    return mixed


class _Tapped(nn.Module):
    """A network that keeps the features the map is drawn over, and records a graph from there on only."""

    def __init__(self, network: nn.Module, block: nn.Module | None) -> None:
        super().__init__()
        self.network = cast("Any", network)
        self.block = block
        self.features: Any = None

    def forward_features(self, pixels: torch.Tensor) -> Any:
        with torch.no_grad():
            if self.block is None:
                return self._keep(self.network.forward_features(pixels))
            hook = self.block.register_forward_pre_hook(lambda _, given: (self._keep(given[0]), *given[1:]))
            try:
                return self.network.forward_features(pixels)
            finally:
                hook.remove()

    def forward_head(self, features: Any, *, pre_logits: bool) -> Any:
        return self.network.forward_head(features, pre_logits=pre_logits)

    def get_classifier(self) -> Any:
        return self.network.get_classifier()

    def _keep(self, features: Any) -> Any:
        if not isinstance(features, torch.Tensor):
            return features
        self.features = features.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return self.features.clone()  # some networks go on in place, which a leaf does not allow


def _evidence(classifier: Classifier, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`float32[N, h, w]`, the map on the grid of the features."""
    network = cast("Any", classifier.network)
    prefix = getattr(network, "num_prefix_tokens", 0)
    features, slope = _features(classifier, images, targets)
    if features.ndim == 3 and hasattr(network, "blocks") and not slope[:, prefix:].any():
        # The head reads a class token only, so the last features of the patches have no effect.
        features, slope = _features(classifier, images, targets, block=network.blocks[-1])
    places, slopes = (_with_places(part, classifier, prefix=prefix) for part in (features, slope))
    return functional.relu((slopes.mean(dim=(2, 3), keepdim=True) * places).sum(dim=1))


def _features(
    classifier: Classifier, images: torch.Tensor, targets: torch.Tensor, *, block: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's last features, or the input of `block`, and the gradient of the target logits by them."""
    tapped = _Tapped(classifier.network, block)
    probe = Classifier(classifier.architecture, tapped).to(images.device).train(classifier.training)
    with torch.enable_grad():
        logits, _ = probe(images)
        if tapped.features is None or len(tapped.features) != len(images):
            raise _unplaced(classifier)
        (slope,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), tapped.features)
    return tapped.features.detach(), slope


def _with_places(features: torch.Tensor, classifier: Classifier, *, prefix: int) -> torch.Tensor:
    """`float32[N, D, h, w]` of feature maps or tokens that cover more than one place."""
    if features.ndim == 4:
        channels_last = getattr(classifier.network, "output_fmt", "NCHW") == "NHWC"
        placed: torch.Tensor = features.permute(0, 3, 1, 2) if channels_last else features
        if placed.shape[2] * placed.shape[3] > 1:
            return placed
    elif features.ndim == 3:
        aspect = classifier.architecture.width / classifier.architecture.height
        images, tokens, channels = features.shape
        # Where the class token is added after the blocks (CaiT, XCiT), these have no prefix.
        for count in (tokens - prefix, tokens):
            height = round((count / aspect) ** 0.5)
            if count > 1 and height * round(height * aspect) == count:
                return features[:, -count:].reshape(images, height, -1, channels).permute(0, 3, 1, 2)
    raise _unplaced(classifier)


def _unplaced(classifier: Classifier) -> ModelError:
    architecture = classifier.architecture
    return ModelError(
        f"Grad-CAM needs features that have places in the image; at {architecture.height}x"
        f"{architecture.width} pixels its last ones have none",
        where=architecture.name,
        fix="explain a network of another family, or one for larger images",
    )
