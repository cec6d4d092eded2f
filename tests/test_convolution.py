from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from holotype.fit.convolution import _Depthwise, _Geometry, faster_convolutions
from holotype.models import Architecture, Classifier
from networks import small_network


def classifier_of(name: str, *, size: int = 64, seed: int = 0) -> Classifier:
    """A network whose batch norms have statistics and scales like those of a trained one."""
    torch.manual_seed(seed)
    classifier = small_network(name, side=size, classes=5)
    classifier.train()
    with torch.no_grad():
        for _ in range(3):
            classifier(pictures(8, size=size))
        for module in classifier.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return classifier.eval()


def pictures(count: int, *, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def gradients(
    classifier: Classifier, images: torch.Tensor, *, half: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    classifier.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        logits, _ = classifier(images)
    functional.cross_entropy(logits, torch.arange(len(images)) % 5).backward()
    found = {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}
    return logits.detach(), {name: value.clone() for name, value in found.items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative distance of all gradients as one vector."""
    assert list(one) == list(other)
    flat = [torch.cat([value.flatten() for value in part.values()]) for part in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        ("tf_efficientnet_lite0", 49),  # "same" padding, depthwise 3x3 and 5x5 with and without strides
        ("resnet18", 20),  # nn.BatchNorm2d or its like, then an activation of the block's own
        ("mobilenetv3_small_050", 34),  # squeeze and excitation between, convolutions with a bias
        ("convnext_atto", 0),  # depthwise 7x7 and no batch norm
    ],
)
def test_logits_and_every_gradient_are_the_same(name: str, folds: int) -> None:
    classifier = classifier_of(name).double()  # in fp32 rounding moves values over the kinks of ReLUs
    images = pictures(3)
    logits, plain = gradients(classifier, images)
    with faster_convolutions(classifier) as folded:
        assert folded == folds
        again, fast = gradients(classifier, images)
        assert any("forward" in vars(module) for module in classifier.modules())
    torch.testing.assert_close(again, logits, rtol=1e-9, atol=1e-9)
    assert distance(fast, plain) < 1e-9
    restored, after = gradients(classifier, images)
    assert torch.equal(restored, logits)
    assert distance(after, plain) == 0
    assert not any("forward" in vars(module) for module in classifier.modules())


def test_bf16_gradients_are_as_near_to_fp32_as_those_of_plain_bf16() -> None:
    classifier = classifier_of("tf_efficientnet_lite0")
    images = pictures(4)
    _, exact = gradients(classifier, images)
    _, plain = gradients(classifier, images, half=True)
    with faster_convolutions(classifier):
        _, fast = gradients(classifier, images, half=True)
    assert distance(fast, exact) < 1.2 * distance(plain, exact)


def test_norms_in_training_mode_are_computed_as_ever() -> None:
    classifier = classifier_of("mobilenetv3_small_050").double().train()
    images = pictures(6)
    twin = copy.deepcopy(classifier)
    logits, plain = gradients(twin, images)
    with faster_convolutions(classifier):
        assert classifier.training
        again, fast = gradients(classifier, images)
    torch.testing.assert_close(again, logits, rtol=1e-9, atol=1e-9)
    assert distance(fast, plain) < 1e-9
    for (name, mine), theirs in zip(classifier.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=name)


def test_parameters_keep_their_names_and_a_copy_follows_its_own() -> None:
    classifier = classifier_of("resnet18")
    images = pictures(2)
    names = list(classifier.state_dict())
    with faster_convolutions(classifier):
        assert list(classifier.state_dict()) == names
        twin = copy.deepcopy(classifier)
        with torch.no_grad():
            before = classifier(images)[0]
            for parameter in twin.parameters():
                parameter.mul_(1.1)
            assert torch.equal(classifier(images)[0], before)
            changed = twin(images)[0]
    plain = classifier_of("resnet18")
    plain.load_state_dict(twin.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(images)[0], changed, rtol=1e-3, atol=1e-4)


def test_who_watches_a_norm_sees_what_goes_into_it() -> None:
    classifier = classifier_of("resnet18")
    images = pictures(2)
    norm = classifier.network.get_submodule("bn1")
    seen: list[torch.Tensor] = []
    with torch.no_grad(), faster_convolutions(classifier):
        fast = classifier(images)[0]
        with norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            watched = classifier(images)[0]
        assert torch.equal(classifier(images)[0], fast)
    with torch.no_grad(), norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        classifier(images)
    assert torch.equal(*seen)
    torch.testing.assert_close(watched, fast, rtol=1e-3, atol=1e-4)


class _Forked(nn.Module):
    """What its convolution gives goes into a norm, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        seen = self.conv(pixels)
        return self.norm(seen) + 2 * seen

    def forward_head(self, features: torch.Tensor, *, pre_logits: bool) -> torch.Tensor:
        return features.mean((2, 3))

    def get_classifier(self) -> nn.Linear:
        return self.head


def test_a_convolution_that_something_else_reads_too_is_not_folded() -> None:
    torch.manual_seed(0)
    architecture = Architecture(
        name="forked", classes=5, height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    classifier = Classifier(architecture, _Forked())
    classifier(pictures(8, size=32))  # statistics that are not 0 and 1
    classifier.eval()
    images = pictures(4, size=32)
    logits, plain = gradients(classifier, images)
    with faster_convolutions(classifier) as folded:
        assert folded == 0
        again, fast = gradients(classifier, images)
    assert torch.equal(again, logits)
    assert distance(fast, plain) == 0


@pytest.mark.parametrize("size", [4, 5, 7, 8])
@pytest.mark.parametrize(("stride", "padding"), [((1, 1), (2, 2)), ((2, 2), (0, 0)), ((2, 1), (1, 3))])
def test_depthwise_gradients_are_those_of_finite_differences(
    size: int, stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    torch.manual_seed(size)
    images = torch.randn(2, 3, 9, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, size, size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    geometry = _Geometry(stride, padding)
    assert torch.autograd.gradcheck(
        lambda *parts: _Depthwise.apply(*parts, geometry), (images, weight, bias), fast_mode=True
    )
