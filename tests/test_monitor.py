from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from holotype.config import MonitorConfig
from holotype.fit.monitor import Monitor, Step
from holotype.models import Classifier, stages
from holotype.runlog import METRIC_COLUMNS, RunLog, read_rows
from networks import small_network

BATCH = 24
TIMES = {"seconds": 2.0, "waited": 0.5, "augmented": 0.25}


def network(name: str = "test_resnet") -> Classifier:
    torch.manual_seed(0)
    return small_network(name, classes=10)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real digits `uint8[24, 32, 32, 3]` and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = slice(number * BATCH, (number + 1) * BATCH)
    grey = np.kron(255 - digits.images[rows] * 255 / 16, np.ones((4, 4))).astype(np.uint8)
    return torch.from_numpy(np.repeat(grey[..., None], 3, axis=3)), torch.from_numpy(digits.target[rows])


class Run:
    """A training run of a few steps of plain gradient descent, watched."""

    def __init__(
        self, *, folder: Path | None = None, every: int | Literal["auto"] = 2, steps: int = 10_000,
        clip: float = 1.0, parts: int = 1,
        prepare: Callable[[Classifier], object] = lambda classifier: None, name: str = "test_resnet",
    ) -> None:  # fmt: skip
        self.classifier = network(name).train()
        prepare(self.classifier)
        self.clip, self.parts = clip, parts
        self.trained = [p for p in self.classifier.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=0.1)
        self.monitor = Monitor(self.classifier, MonitorConfig(every=every), steps=steps, folder=folder)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, number: int, *, epoch: int = 1) -> None:
        images, labels = batch(number)
        self.monitor.begin_step(number)
        loss, right = 0.0, 0
        for own, wanted in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True):
            logits, _ = self.classifier(own)
            part = functional.cross_entropy(logits, wanted, reduction="sum") / len(labels)
            part.backward()
            loss, right = loss + float(part.detach()), right + int((logits.argmax(1) == wanted).sum())
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.clip))
        before = self.monitor.before_step(number)
        self.optimizer.step()
        step = Step(number, epoch, loss, right, norm, [0.1, 0.05], len(labels), **TIMES)
        self.monitor.after_step(step, before=before)
        self.optimizer.zero_grad()
        self.losses.append(loss)
        self.norms.append(norm)


def hooks(classifier: Classifier) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in classifier.modules())


class TestRows:
    def test_one_for_every_so_many_steps_with_the_means_since_the_last(self) -> None:
        run = Run(every=3)
        for number in range(5):
            run.step(number)
        rows = run.monitor.rows
        assert [row["step"] for row in rows] == [0, 3]
        assert rows[0]["loss"] == pytest.approx(run.losses[0], rel=1e-5)
        assert rows[1]["loss"] == pytest.approx(np.mean(run.losses[1:4]), rel=1e-5)
        assert rows[1]["gradient_norm"] == pytest.approx(np.mean(run.norms[1:4]), rel=1e-5)
        assert rows[1]["gradient_norm_max"] == pytest.approx(max(run.norms[1:4]), rel=1e-5)
        assert (rows[0]["learning_rate"], rows[0]["learning_rate_least"]) == (0.1, 0.05)

    @pytest.mark.parametrize(
        ("every", "steps", "rows"),
        [
            ("auto", 30, [0, 1, 2, 3, 4, 5]),
            ("auto", 60, [0, 2, 4]),
            ("auto", 10_000, [0]),
            (4, 30, [0, 4]),
            (5, 6, [0, 5]),
        ],
    )
    def test_a_number_that_was_asked_for_is_kept_to_in_a_short_run_too(
        self, every: int | Literal["auto"], steps: int, rows: list[int]
    ) -> None:
        run = Run(every=every, steps=steps)
        for number in range(6):
            run.step(number)
        assert [row["step"] for row in run.monitor.rows] == rows

    @pytest.mark.parametrize("clip", [1e-3, 1e9], ids=["clipped", "free"])
    def test_stages_have_the_norms_of_the_gradient_before_clipping(self, clip: float) -> None:
        classifier = network().train()
        images, labels = batch(0)
        functional.cross_entropy(classifier(images)[0], labels).backward()
        expected = {
            stage.name: math.hypot(*(float(p.grad.norm()) for p in stage.parameters if p.grad is not None))
            for stage in stages(classifier)
        }
        run = Run(clip=clip)
        run.step(0)
        (row,) = run.monitor.rows
        for name, norm in expected.items():
            assert row[f"gradient_norm/{name}"] == pytest.approx(norm, rel=1e-3)
        parts = [float(row[f"gradient_norm/{name}"]) for name in (*expected, "head")]
        assert math.hypot(*parts) == pytest.approx(float(row["gradient_norm"]), rel=1e-4)

    def test_update_ratios_are_rate_times_gradient_over_weights(self) -> None:
        run = Run(clip=1e9)
        sizes = {
            stage.name: math.hypot(*(float(p.detach().norm()) for p in stage.parameters))
            for stage in stages(run.classifier)
        }
        run.step(0)
        (row,) = run.monitor.rows
        for name, size in sizes.items():
            assert row[f"update_ratio/{name}"] == pytest.approx(
                0.1 * float(row[f"gradient_norm/{name}"]) / size, rel=1e-3
            )
        assert 0 < float(row["update_ratio"]) < 1

    def test_frozen_stages_stay_empty(self) -> None:
        def freeze(classifier: Classifier) -> None:
            for stage in stages(classifier)[:2]:
                for parameter in stage.parameters:
                    parameter.requires_grad_(False)

        run = Run(prepare=freeze)
        run.step(0)
        (row,) = run.monitor.rows
        frozen = [stage.name for stage in stages(run.classifier)[:2]]
        assert not [
            name for name in frozen if f"gradient_norm/{name}" in row or f"update_ratio/{name}" in row
        ]
        assert all(f"gradient_norm/{name}" in row for name in ("stage 3", "head"))

    def test_a_step_that_is_no_number_is_written_after_what_came_before_it(self) -> None:
        run = Run(every=10)
        for number in range(3):
            run.step(number)
        run.monitor.fail_step(Step(3, 1, math.nan, 0.0, math.inf, [0.1], BATCH, **TIMES))
        assert [row["step"] for row in run.monitor.rows] == [0, 2, 3]
        assert run.monitor.rows[1]["loss"] == pytest.approx(np.mean(run.losses[1:]), rel=1e-5)
        assert math.isnan(float(run.monitor.rows[2]["loss"]))
        assert run.monitor.rows[2]["gradient_norm"] == math.inf

    def test_epochs_have_their_own_means_and_times(self) -> None:
        run = Run(every=1)
        for number in range(3):
            run.step(number, epoch=1 + number // 2)
        ratios = [float(row["update_ratio"]) for row in run.monitor.rows]
        assert run.monitor.epoch_metrics(2) == {"update_ratio": pytest.approx(ratios[2])}
        assert run.monitor.epoch_metrics(1) == {}
        timings = run.monitor.epoch_timings(2)
        assert (timings["seconds"], timings["data_wait_seconds"]) == (2.0, 0.5)
        assert timings["augment_seconds"] == 0.25
        assert timings["images_per_second"] == BATCH / 2
        assert float(timings["memory_mb"]) > 50


class TestSignals:
    def test_nothing_is_hooked_outside_a_detailed_step(self) -> None:
        run = Run(every=2)
        assert hooks(run.classifier) == 0
        run.monitor.begin_step(0)
        assert hooks(run.classifier) > 0
        run.monitor.before_step(0)
        assert hooks(run.classifier) == 0
        run.monitor.begin_step(1)
        assert hooks(run.classifier) == 0

    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
    def test_fresh_networks_have_no_dead_layer(self, name: str) -> None:
        run = Run(name=name)
        run.step(0)
        shares = [value for key, value in run.monitor.rows[0].items() if key.startswith("dead/")]
        assert len(shares) >= 3
        assert max(float(share) for share in shares) < 0.5

    def test_units_below_zero_for_every_image_are_dead(self) -> None:
        def kill(classifier: Classifier) -> None:
            layer = dict(classifier.network.named_modules())["layer2.0.bn1"]
            with torch.no_grad():
                layer.bias[:4] -= 1000  # type: ignore[operator]

        run = Run(prepare=kill)
        run.step(0)
        layer = dict(run.classifier.network.named_modules())["layer2.0.bn1"]
        assert run.monitor.rows[0]["dead/stage 2"] == pytest.approx(4 / len(layer.bias), rel=1e-4)
        assert run.monitor.rows[0]["dead/stage 1"] == 0

    def test_a_linear_layer_has_its_units_in_the_last_axis(self) -> None:
        def kill(classifier: Classifier) -> None:
            layer = dict(classifier.network.named_modules())["blocks.1.mlp.fc1"]
            with torch.no_grad():
                layer.bias[: len(layer.bias) // 2] -= 1000  # type: ignore[operator]

        run = Run(prepare=kill, name="test_vit")
        run.step(0)
        dead = {key: value for key, value in run.monitor.rows[0].items() if key.startswith("dead/")}
        assert sorted(dead.values()) == [0] * (len(dead) - 1) + [0.5]

    def test_a_unit_that_one_part_of_the_batch_wakes_is_not_dead(self) -> None:
        def lull(classifier: Classifier) -> None:
            """Let a unit be above zero for an image of the first quarter, and for none of the last."""
            classifier.eval()
            layer = dict(classifier.network.named_modules())["layer2.0.bn1"]
            seen: list[torch.Tensor] = []
            handle = layer.register_forward_hook(lambda *_: seen.append(_[2].amax((2, 3))))
            with torch.no_grad():
                classifier(batch(0)[0])
                handle.remove()
                first, last = seen[0][:6].amax(0), seen[0][-6:].amax(0)
                unit = int((first - last).argmax())
                layer.bias[unit] -= (first[unit] + last[unit]) / 2  # type: ignore[operator]

        whole, cut = Run(prepare=lull), Run(prepare=lull, parts=4)
        whole.step(0)
        cut.step(0)
        assert cut.monitor.rows[0]["dead/stage 2"] == whole.monitor.rows[0]["dead/stage 2"] < 1

    def test_statistics_that_fit_have_no_mismatch_and_shifted_ones_what_they_are_shifted_by(self) -> None:
        def frozen(classifier: Classifier) -> None:
            """Statistics of the very batch, but for two layers."""
            layers = {n: m for n, m in classifier.named_modules() if isinstance(m, nn.BatchNorm2d)}
            for layer in layers.values():
                layer.momentum = 1.0
            with torch.no_grad():
                classifier(batch(0)[0])
            shifted, scaled = layers["network.layer2.0.bn2"], layers["network.layer3.0.bn2"]
            shifted.running_mean += 2 * (shifted.running_var + shifted.eps).sqrt()
            scaled.running_var[:] = (scaled.running_var + scaled.eps) * math.e**2 - scaled.eps
            classifier.eval()

        run = Run(prepare=frozen, parts=3)
        # A layer behind one that is off sees another batch, so only what lies before is exact.
        run.step(0)
        row = run.monitor.rows[0]
        assert row["norm_mismatch/stage 1"] < 0.01
        assert row["norm_mismatch/stage 2"] == pytest.approx(2, abs=0.02)
        assert float(row["norm_mismatch/stage 3"]) > 0.9

    def test_layers_that_follow_the_batch_are_not_compared(self) -> None:
        run = Run()
        run.step(0)
        assert not [name for name in run.monitor.rows[0] if name.startswith("norm_mismatch/")]


class TestFile:
    def run(self, folder: Path, *, steps: range, every: int = 2) -> Run:
        run = Run(folder=folder, every=every)
        for number in steps:
            run.step(number)
        return run

    def test_holds_the_rows_and_no_time(self, tmp_path: Path) -> None:
        run = self.run(tmp_path, steps=range(5))
        text = (tmp_path / "steps.csv").read_text()
        assert read_rows(text) == run.monitor.rows
        assert len(run.monitor.rows) == 3
        assert "second" not in text
        again = tmp_path / "again"
        again.mkdir()
        self.run(again, steps=range(5))
        assert (again / "steps.csv").read_text() == text

    @pytest.mark.parametrize("stop", [0, 3, 4])
    def test_a_killed_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(
        self, tmp_path: Path, stop: int
    ) -> None:
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        whole.mkdir()
        cut.mkdir()
        rows = self.run(whole, steps=range(8)).monitor.rows
        run = Run(folder=cut)
        for number in range(stop):
            run.step(number)
        weights = {name: value.clone() for name, value in run.classifier.state_dict().items()}
        state = json.loads(json.dumps(run.monitor.state()))
        for number in range(stop, 6):  # after the checkpoint, and lost
            run.step(number)
        with (cut / "steps.csv").open("a") as stream:
            stream.write("6,1,0.12")  # killed while writing
        resumed = Run(folder=cut)
        resumed.classifier.load_state_dict(weights)
        resumed.monitor.restore(state)
        for number in range(stop, 8):
            resumed.step(number)
        assert (cut / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
        assert resumed.monitor.rows == rows

    def test_goes_on_where_the_file_was_lost_and_says_so(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = self.run(tmp_path, steps=range(4))
        state = run.monitor.state()
        (tmp_path / "steps.csv").unlink()
        run.monitor.restore(state)
        assert "shorter than it was" in " ".join(capsys.readouterr().err.split())
        run.step(4)
        assert [row["step"] for row in read_rows((tmp_path / "steps.csv").read_text())] == [4]

    def test_without_a_folder_nothing_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = Run()
        run.step(0)
        assert run.monitor.state()["bytes"] == 0
        assert not list(tmp_path.iterdir())


ROWS = [{"stage": "fine-tune", "epoch": e, "train_loss": 1 / (3 * e)} for e in (1, 2, 3)]


class TestRunLog:
    def test_a_resumed_log_drops_what_came_after_the_checkpoint(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path)
        for row in ROWS:
            log.add(row, {"stage": "fine-tune", "epoch": row["epoch"], "seconds": 1.0})
        text = (tmp_path / "metrics.csv").read_text()
        kept = RunLog.resume(tmp_path, metrics=log.metrics[:2], timings=log.timings[:1])
        assert read_rows((tmp_path / "metrics.csv").read_text())[-1]["epoch"] == 2
        assert len(read_rows((tmp_path / "timings.csv").read_text())) == 1
        kept.add(ROWS[2], {"stage": "fine-tune"})
        assert (tmp_path / "metrics.csv").read_text() == text

    def test_without_a_folder_it_only_remembers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        log = RunLog(None)
        log.add(ROWS[0], {"stage": "fine-tune"})
        assert log.metrics == ROWS[:1]
        assert not list(tmp_path.iterdir())

    def test_rows_come_back_as_numbers_and_names(self, tmp_path: Path) -> None:
        RunLog(tmp_path).add(ROWS[0], {"stage": "fine-tune"})
        assert read_rows((tmp_path / "metrics.csv").read_text()) == [
            {"stage": "fine-tune", "epoch": 1.0, "train_loss": 0.333333}
        ]

    def test_every_metric_an_epoch_is_chosen_by_has_its_column(self) -> None:
        wanted = {"loss", "accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "ece"}
        assert {f"validation_{name}" for name in wanted} <= set(METRIC_COLUMNS)
