from __future__ import annotations

import numpy as np
import pytest
import torch

from holotype.config import DistillConfig, FitConfig
from holotype.errors import ConfigError
from holotype.imbalance import Remedy
from holotype.loss import Criterion, criterion, distilled

CLASSES = ("boot", "hat", "shirt")
COUNTS = np.array([60, 30, 10])
PRIOR = COUNTS / 100


def made(imbalance: Remedy = "none", *, device: str = "cpu", **settings: object) -> Criterion:
    config = FitConfig.model_validate({"label_smoothing": 0.0, **settings})
    shown = COUNTS.astype(np.float64)
    return criterion(config, imbalance=imbalance, shown=shown, classes=CLASSES, device=torch.device(device))


def batch(*, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of six images; targets of three are one class, of three a mixture."""
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    mixed = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    return logits, torch.cat([torch.eye(3, dtype=torch.float64), mixed / mixed.sum(1, keepdim=True)])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def by_hand(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    adjustment: np.ndarray | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
    spread: np.ndarray | None = None,
) -> np.ndarray:
    """Sum over labels k of q_k w_k L(k), L of one label smoothed by itself: another way to the formula."""
    p = softmax(logits + (0 if adjustment is None else adjustment))
    spread = np.full(3, 1 / 3) if spread is None else spread
    surprise = -np.log(p)
    smoothed = (1 - smoothing) * surprise + smoothing * (surprise * spread).sum(axis=1, keepdims=True)
    of_label = (1 - p) ** gamma * smoothed
    return (targets * (1 if weights is None else weights) * of_label).sum(axis=1)


BALANCED = 100 / (3 * COUNTS)


class TestCriterion:
    @pytest.mark.parametrize(
        ("imbalance", "settings", "terms"),
        [
            ("none", {}, {}),
            ("none", {"label_smoothing": 0.1}, {"smoothing": 0.1}),
            ("sampler", {"label_smoothing": 0.1}, {"smoothing": 0.1}),
            ("weights", {}, {"weights": BALANCED}),
            ("weights", {"label_smoothing": 0.2}, {"weights": BALANCED, "smoothing": 0.2}),
            ("focal", {}, {"gamma": 2.0}),
            ("focal", {"focal_gamma": 0.5, "label_smoothing": 0.1}, {"gamma": 0.5, "smoothing": 0.1}),
            ("focal", {"focal_alpha": "balanced"}, {"gamma": 2.0, "weights": BALANCED}),
            (
                "focal",
                {"focal_alpha": {"shirt": 3.0, "boot": 1.0, "hat": 0.5}},
                {"gamma": 2.0, "weights": np.array([1.0, 0.5, 3.0])},
            ),
            ("logit-adjust", {}, {"adjustment": np.log(PRIOR)}),
            (
                "logit-adjust",
                {"logit_tau": 1.5, "label_smoothing": 0.1},
                {
                    "adjustment": 1.5 * np.log(PRIOR),
                    "smoothing": 0.1,
                    "spread": PRIOR**1.5 / (PRIOR**1.5).sum(),
                },
            ),
        ],
    )
    def test_is_its_formula(self, imbalance: Remedy, settings: dict, terms: dict) -> None:
        logits, targets = batch()
        found = made(imbalance, **settings)(logits, targets)
        assert found.shape == (6,)
        np.testing.assert_allclose(found, by_hand(logits.numpy(), targets.numpy(), **terms), rtol=1e-6)

    @pytest.mark.parametrize("imbalance", ["none", "weights", "focal", "logit-adjust"])
    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    def test_gradient_is_that_of_the_loss(self, imbalance: Remedy, gamma: float) -> None:
        logits, targets = batch()
        loss = made(imbalance, focal_gamma=gamma, label_smoothing=0.1)
        assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits.requires_grad_())

    def test_without_a_remedy_it_is_torchs_cross_entropy(self) -> None:
        logits, targets = batch()
        wanted = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
        torch.testing.assert_close(made(label_smoothing=0.1)(logits, targets), wanted)

    def test_focal_loss_without_its_exponent_is_cross_entropy(self) -> None:
        logits, targets = batch()
        torch.testing.assert_close(
            made("focal", focal_gamma=0.0)(logits, targets), made("none")(logits, targets)
        )

    def test_smoothing_does_not_outweigh_the_focus(self) -> None:
        """Weighed class by class, the smoothed terms of the others would make 0.7 the best probability."""
        chances = torch.linspace(0.34, 0.99, 200, dtype=torch.float64)
        others = (1 - chances) / 2
        logits = torch.stack([chances, others, others], 1).log()
        losses = made("focal", label_smoothing=0.1)(logits, torch.eye(3, dtype=torch.float64)[[0] * 200])
        assert chances[losses.argmin()] > 0.95

    def test_a_batch_does_not_change_an_images_loss(self) -> None:
        logits, targets = batch()
        for imbalance in ("weights", "focal", "logit-adjust"):
            loss = made(imbalance, label_smoothing=0.1)
            alone = torch.cat([loss(logits[i : i + 1], targets[i : i + 1]) for i in range(6)])
            torch.testing.assert_close(alone, loss(logits, targets))

    def test_weights_leave_the_mean_loss_of_an_epoch_as_it_is(self) -> None:
        # The same logits for all: only the weights differ, and their mean over the training images is 1.
        labels = np.repeat(np.arange(3), COUNTS)
        targets = torch.eye(3)[labels]
        assert made("weights")(torch.zeros(100, 3), targets).mean() == pytest.approx(np.log(3), rel=1e-6)
        by_class = np.bincount(labels, weights=made("weights")(torch.zeros(100, 3), targets))
        np.testing.assert_allclose(by_class, by_class[0], rtol=1e-5)

    def test_smoothing_does_not_undo_the_logit_adjustment(self) -> None:
        # The best logits on images that tell nothing are equal: p must be the prior, which is the targets'.
        labels = torch.from_numpy(np.repeat(np.arange(3), COUNTS))
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = made("logit-adjust", label_smoothing=0.1)(logits.expand(100, 3), torch.eye(3)[labels]).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        np.testing.assert_allclose(gradient, 0, atol=1e-8)

    @pytest.mark.parametrize("imbalance", ["none", "weights", "focal", "logit-adjust"])
    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
    def test_huge_logits_give_finite_losses_and_gradients(
        self, imbalance: Remedy, gamma: float, kind: torch.dtype
    ) -> None:
        logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 0.0], [0.0, 0.0, 0.0]], dtype=kind)
        logits.requires_grad_()
        targets = torch.eye(3)[[0, 0, 0]]
        for smoothing in (0.0, 0.1):
            losses = made(imbalance, focal_gamma=gamma, label_smoothing=smoothing)(logits, targets)
            assert losses.dtype == torch.float32
            assert losses.isfinite().all()
            assert losses[1] > 1e4 > losses[2]
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
            assert gradient.isfinite().all()

    @pytest.mark.parametrize(
        ("alpha", "said"),
        [
            ({"boot": 1, "hat": 1}, "fit.focal_alpha: lacks the class 'shirt'"),
            ({"boot": 1, "hat": 1, "shirt": 1, "scarf": 1}, "names what is no class: 'scarf'"),
        ],
    )
    def test_alpha_that_fits_no_class_is_refused(self, alpha: dict[str, float], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            made("focal", focal_alpha=alpha)
        made("weights", focal_alpha=alpha)


class TestDistilled:
    def test_is_its_formula(self) -> None:
        logits, targets = batch()
        teacher = 3 * logits.flip(0)
        own = made()(logits, targets)
        p, q = softmax(teacher.numpy() / 4), softmax(logits.numpy() / 4)
        wanted = 0.3 * own.numpy() + 0.7 * 16 * (p * np.log(p / q)).sum(axis=1)
        found = distilled(own, logits, teacher, config=DistillConfig(weight=0.7, temperature=4.0))
        np.testing.assert_allclose(found, wanted, rtol=1e-9)

    def test_a_student_that_answers_as_the_teacher_has_only_its_own_loss(self) -> None:
        logits, targets = batch()
        own = made()(logits, targets)
        found = distilled(own, logits, logits + 5, config=DistillConfig(weight=0.25))
        torch.testing.assert_close(found, 0.75 * own)

    def test_gradient_is_that_of_the_loss(self) -> None:
        logits, targets = batch()
        teacher, loss, config = logits.flip(0).clone(), made(), DistillConfig(temperature=3.0)
        assert torch.autograd.gradcheck(
            lambda z: distilled(loss(z, targets), z, teacher, config=config), logits.requires_grad_()
        )

    def test_logits_in_half_precision_are_not_computed_with_in_it(self) -> None:
        logits, targets = batch()
        half, own = logits.bfloat16(), made()(logits, targets).float()
        config = DistillConfig(temperature=3.0)
        wanted = distilled(own, half.float(), half.flip(0).float(), config=config)
        torch.testing.assert_close(distilled(own, half, half.flip(0), config=config), wanted)

    def test_huge_logits_give_finite_gradients(self) -> None:
        logits = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.bfloat16, requires_grad=True)
        targets = torch.eye(3)[:1]
        loss = distilled(made()(logits, targets), logits, -logits.detach(), config=DistillConfig())
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
