"""Heat maps lie on what decides the class, for CNNs and transformers, and depend on the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holotype.errors import ModelError
from holotype.models import Architecture, Classifier, create, set_head
from holotype.saliency import heat_maps, overlay
from networks import small_network

PATCH = 32
COLOURS = ((230, 20, 20), (20, 20, 230))


def network(name: str, *, side: int, classes: int = 2, seed: int = 0, **options: Any) -> Classifier:
    torch.manual_seed(seed)
    return small_network(name, side=side, classes=classes, **options).eval()


def patched(count: int, *, side: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of coloured noise with a red (0) or blue (1) patch: pixels, classes, corners of the patches."""
    draw = np.random.default_rng(seed)
    images = draw.integers(60, 200, (count, side // 8, side // 8, 3)).astype(np.uint8)
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    classes = draw.integers(0, 2, count)
    corners = draw.integers(0, side // PATCH, (count, 2)) * PATCH
    for image, kind, (top, left) in zip(images, classes, corners, strict=True):
        image[top : top + PATCH, left : left + PATCH] = COLOURS[kind]
    return images, classes, corners


def fit_head(classifier: Classifier, images: np.ndarray, classes: np.ndarray) -> None:
    """Ridge regression of the classes on the embeddings."""
    with torch.no_grad():
        values = classifier(torch.from_numpy(images))[1].double()
    mean, scale = values.mean(0), values.std(0) + 1e-8
    inputs, targets = (values - mean) / scale, torch.from_numpy(2.0 * classes - 1)
    penalty = 10 * torch.eye(inputs.shape[1], dtype=torch.double)
    weight = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (targets - targets.mean())) / scale
    bias = targets.mean() - weight @ mean
    set_head(classifier, torch.stack([-weight, weight]).float(), torch.stack([-bias, bias]).float())


def pointing(heat: np.ndarray, corners: np.ndarray) -> float:
    """Share of images whose hottest place is in the patch, or within 8 pixels (Zhang et al. 2018)."""
    hits = []
    for one, corner in zip(heat, corners, strict=True):
        place = np.array(np.unravel_index(one.argmax(), one.shape))
        hits.append(((corner - 8 <= place) & (place < corner + PATCH + 8)).all())
    return float(np.mean(hits))


def averaging_transformer(side: int) -> Classifier:
    """A ViT whose class token gets, in the last block, the mean of what each patch says: red or blue."""
    classifier = network("test_vit", side=side)
    vit: Any = classifier.network
    width = vit.embed_dim
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
        # Channels 0 and 1 are how red and how blue; 2 and 3 keep layer norm from scaling up grey patches.
        colour = vit.patch_embed.proj.weight
        pixels = colour[0, 0].numel()
        colour[0, 0], colour[0, 2] = 1 / pixels, -1 / pixels
        colour[1] = -colour[0]
        vit.patch_embed.proj.bias[2], vit.patch_embed.proj.bias[3] = 5.0, -5.0
        attention = vit.blocks[-1].attn
        attention.qkv.weight[2 * width :] = torch.eye(width)  # equal attention; values are the tokens
        attention.proj.weight.copy_(torch.eye(width))
        vit.head.weight[0, 0] = vit.head.weight[1, 1] = 1.0
        for block in vit.blocks:
            for scale in (block.ls1, block.ls2):
                if hasattr(scale, "gamma"):
                    scale.gamma.fill_(1.0)
    return classifier


class TestPointing:
    def test_cnn(self) -> None:
        classifier = network("test_resnet", side=96)
        fit_head(classifier, *patched(128, side=96, seed=0)[:2])
        images, classes, corners = patched(32, side=96, seed=1)
        assert pointing(heat_maps(classifier, images, classes), corners) >= 0.9
        # There is no evidence for the other colour where the patch is.
        assert pointing(heat_maps(classifier, images, 1 - classes), corners) <= 0.3

    def test_transformer_that_reads_its_class_token(self) -> None:
        classifier = averaging_transformer(96)
        images, classes, corners = patched(32, side=96, seed=1)
        with torch.no_grad():
            answers = classifier(torch.from_numpy(images))[0].argmax(1).numpy()
        assert (answers == classes).all()
        assert pointing(heat_maps(classifier, images, classes), corners) >= 0.9

    def test_other_weights_give_other_maps(self) -> None:
        """The sanity check of Adebayo et al. (2018)."""
        images, classes, corners = patched(32, side=96, seed=1)
        classifier = network("test_resnet", side=96)
        fit_head(classifier, *patched(128, side=96, seed=0)[:2])
        before = heat_maps(classifier, images, classes)
        head = [parameter.clone() for parameter in classifier.network.get_classifier().parameters()]
        other = network("test_resnet", side=96, seed=1)
        set_head(other, *head)
        after = heat_maps(other, images, classes)
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] < 0.5
        assert pointing(after, corners) <= pointing(before, corners) - 0.2


class TestContract:
    @pytest.mark.parametrize(
        ("name", "side"),
        [
            ("resnet18", 96),
            ("tf_efficientnet_lite0", 96),
            ("convnext_atto", 96),
            ("vit_tiny_patch16_224", 64),
            ("xcit_nano_12_p16_224", 64),
            ("test_vit_relpos", 64),
            ("swin_tiny_patch4_window7_224", 224),
        ],
    )
    def test_families(self, name: str, side: int) -> None:
        classifier = network(name, side=side, classes=3)
        images = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8).repeat(3, 0)
        heat = heat_maps(classifier, images, np.array([0, 1, 2]))
        assert heat.shape == images.shape[:3]
        assert heat.dtype == np.float32
        assert np.isfinite(heat).all()
        assert heat.min() >= 0
        strongest = heat.max(axis=(1, 2))
        assert set(strongest.round(5).tolist()) <= {0.0, 1.0}
        assert heat[strongest > 0].std(axis=(1, 2)).min() > 0.01
        assert len(np.unique(heat, axis=0)) > 1  # classes have maps of their own

    def test_an_image_has_the_same_map_alone_and_among_others(self) -> None:
        classifier = network("test_resnet", side=64, dropout=0.5)
        images, classes, _ = patched(9, side=64, seed=0)
        together = heat_maps(classifier, images, classes)
        for row in (0, 8):
            alone = heat_maps(classifier, images[row : row + 1], classes[row : row + 1])
            assert alone[0] == pytest.approx(together[row], abs=1e-4)

    def test_the_classifier_stays_as_it_is(self) -> None:
        classifier = network("test_vit", side=64)
        before = {name: value.clone() for name, value in classifier.state_dict().items()}
        with torch.no_grad():
            heat_maps(classifier, *patched(2, side=64, seed=0)[:2])
        assert not classifier.training
        assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())
        for parameter in classifier.parameters():
            assert parameter.requires_grad
            assert parameter.grad is None

    def test_images_need_not_be_square(self) -> None:
        torch.manual_seed(0)
        half = (0.5, 0.5, 0.5)
        wide = Architecture(name="test_vit", classes=2, height=32, width=96, mean=half, std=half)
        images = np.random.default_rng(0).integers(0, 256, (1, 32, 96, 3)).astype(np.uint8)
        assert heat_maps(create(wide).eval(), images, np.array([1])).shape == (1, 32, 96)

    def test_no_evidence_is_no_heat(self) -> None:
        classifier = network("test_resnet", side=64)
        head = classifier.network.get_classifier()
        set_head(classifier, torch.zeros_like(head.weight), torch.zeros_like(head.bias))
        assert (heat_maps(classifier, *patched(2, side=64, seed=0)[:2]) == 0).all()

    @pytest.mark.parametrize(
        ("name", "side"),
        [("resnet18", 32), ("pit_ti_224", 224), ("coat_tiny", 224)],
    )
    def test_networks_without_places(self, name: str, side: int) -> None:
        classifier = network(name, side=side)
        images = np.zeros((2, side, side, 3), dtype=np.uint8)
        with pytest.raises(ModelError, match=f"{name}: Grad-CAM needs features that have places"):
            heat_maps(classifier, images, np.array([0, 1]))


def test_overlay_colours_only_what_is_hot() -> None:
    images = np.full((1, 2, 2, 3), 100, dtype=np.uint8)
    heat = np.array([[[0.0, 0.0], [0.5, 1.0]]], dtype=np.float32)
    shown = overlay(images, heat)
    assert shown.dtype == np.uint8
    assert (shown[0, 0] == 100).all()
    spread = shown[0, 1].max(axis=1).astype(int) - shown[0, 1].min(axis=1)
    assert spread[1] > spread[0] > 20
