from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holotype.bundle import Bundle
from holotype.config import DistillConfig
from holotype.dataset import Shape
from holotype.errors import BundleError, ConfigError
from holotype.fit.teacher import Teacher, open_teacher
from teachers import write_teacher

CLASSES = ("ape", "bear", "cat")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_teacher(tmp_path_factory.mktemp("teacher"), "test_resnet", side=64, classes=CLASSES)


def opened(target: Path, *, classes: tuple[str, ...] = CLASSES, side: int = 64) -> Teacher:
    config = DistillConfig(teacher=str(target))
    teacher = open_teacher(config, classes=classes, sizes=[Shape(side, side)], device=CPU)
    assert teacher is not None
    return teacher


def images(side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, side, side, 3), generator=generator, dtype=torch.uint8)


class TestTeacher:
    def test_there_is_none_unless_one_is_named(self) -> None:
        assert open_teacher(DistillConfig(), classes=CLASSES, sizes=[Shape(64, 64)], device=CPU) is None

    def test_answers_as_its_bundle_does(self, bundle: Bundle) -> None:
        from holotype.runtime import open_runtime

        answer = opened(bundle.path)(images())
        wanted = open_runtime(bundle, name="torch", device="cpu").run(images().numpy()).logits
        torch.testing.assert_close(answer, torch.from_numpy(wanted))
        assert answer.dtype == torch.float32
        torch.testing.assert_close(opened(bundle.path.parent)(images()), answer)

    def test_classes_are_matched_by_name(self, bundle: Bundle) -> None:
        answer = opened(bundle.path)(images())
        torch.testing.assert_close(opened(bundle.path, classes=("cat", "ape"))(images()), answer[:, [2, 0]])

    def test_it_is_frozen(self, bundle: Bundle) -> None:
        teacher = opened(bundle.path)
        assert not teacher(images()).requires_grad
        assert not any(p.requires_grad for p in teacher.classifier.parameters())
        # Neither dropout nor the statistics of a batch change an answer.
        torch.testing.assert_close(teacher(images())[:1], teacher(images()[:1]), rtol=1e-4, atol=1e-4)

    def test_a_student_can_learn_from_its_answers(self, bundle: Bundle) -> None:
        from holotype.loss import distilled

        logits = torch.zeros(4, 3, requires_grad=True)
        distilled(
            torch.zeros(4), logits, opened(bundle.path)(images()), config=DistillConfig()
        ).sum().backward()
        assert logits.grad is not None
        assert logits.grad.abs().max() > 0

    def test_a_class_it_lacks_is_named(self, bundle: Bundle) -> None:
        with pytest.raises(ConfigError, match=r"does not know the class 'dog' and 1 more"):
            opened(bundle.path, classes=("cat", "dog", "eel"))

    def test_a_network_of_any_size_takes_the_students(self, bundle: Bundle) -> None:
        assert opened(bundle.path, side=96)(images(96)).shape == (4, 3)

    def test_a_network_of_one_size_takes_no_other(self, tmp_path: Path) -> None:
        fixed = write_teacher(tmp_path, "test_vit", side=160, classes=CLASSES)
        assert opened(fixed.path, side=160)(images(160)).shape == (4, 3)
        with pytest.raises(ConfigError, match=r"160x160 pixels only, training shows it 64x64"):
            opened(fixed.path, side=64)

    def test_a_bundle_without_torch_weights_teaches_nothing(self, tiny_bundle: Path) -> None:
        with pytest.raises(BundleError, match="no torch weights"):
            opened(tiny_bundle, classes=("red", "blue"))

    def test_what_is_no_bundle_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="no such bundle or run folder"):
            opened(tmp_path / "nowhere")
