"""What a run does while it trains: norms, update ratios, dead units and batch-norm mismatch of every stage.

`steps.csv` has a row for every so many optimizer steps, and no timings, so that equal runs are equal files:

step, epoch                         of the row's last step
loss, accuracy, gradient_norm       means over the steps since the row before; the norm before clipping
gradient_norm_max                   the largest of them
learning_rate, learning_rate_least  of the parameter groups, in the row's last step
update_ratio                        |change| / |weights| of the last step, over all that is trained
gradient_norm/STAGE                 of the last step, before clipping
update_ratio/STAGE                  of the last step
dead/STAGE                          share of dead units in the stage's worst activation layer
norm_mismatch/STAGE                 of the stage's worst frozen batch-norm layer, see `_Statistics`

Stages are the model's own from the input to the output, then `head`; what is frozen stays empty.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from holotype.bundle import write_bytes
from holotype.config import MonitorConfig
from holotype.fit.signals import Signals
from holotype.models import Classifier, head_of, stages
from holotype.progress import note
from holotype.runlog import Row, csv_text, read_rows

__all__ = ["Monitor", "Step", "Weights"]

Weights = tuple[torch.Tensor | None, ...]
"""Copies of the weights that are trained, in the order of the monitor's parameters; None for frozen ones."""

_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "accuracy",
    "gradient_norm",
    "gradient_norm_max",
    "learning_rate",
    "learning_rate_least",
    "update_ratio",
)
_USUAL, _ROWS = 10, 30
_CLOCKED = ("images", "seconds", "waited", "augmented")
_OF_STAGES = ("gradient_norm", "update_ratio", "dead", "norm_mismatch")


@dataclass(frozen=True)
class Step:
    """What there is to say of an optimizer step, counted from 0 over the whole run, when it is done.

    `loss` is the mean over its `images`, of which `right` were classified rightly; `gradient_norm` that
    before clipping; `rates` are those of the parameter groups; `seconds` is the whole time since the step
    before, of which `waited` were spent waiting for data and `augmented` changing it.
    """

    number: int
    epoch: int
    loss: float
    right: float
    gradient_norm: float
    rates: Sequence[float]
    images: int
    seconds: float
    waited: float
    augmented: float

    @property
    def taken(self) -> bool:
        """False where half precision overflowed: the optimizer has passed the step over."""
        return math.isfinite(self.gradient_norm)


class Monitor:
    """Records a run step by step; call it so, for every optimizer step:

    `begin_step` before the first forward, `before_step` after backward and clipping, `after_step` after the
    optimizer's step and before the gradients are cleared. Without a folder the rows are only kept in memory.
    """

    def __init__(
        self, classifier: Classifier, config: MonitorConfig, *, steps: int, folder: Path | None
    ) -> None:
        # By itself a short run has rows enough to see a trend in.
        self._every = min(_USUAL, max(steps // _ROWS, 1)) if config.every == "auto" else config.every
        self._last = steps - 1
        self._file = None if folder is None else folder / "steps.csv"
        self._stages = _stages(classifier)
        self._parameters = tuple(p for parameters in self._stages.values() for p in parameters)
        self._signals = Signals(classifier, self._stages)
        self._columns = (*_COLUMNS, *(f"{kind}/{name}" for kind in _OF_STAGES for name in self._stages))
        self._pending = _nothing()
        self._ratios: dict[str, float] = {}
        self._clock: dict[str, float] = {}
        self._begun = False
        self.rows: list[Row] = []

    def detailed(self, step: int) -> bool:
        """Whether `step` (counted from 0 over the whole run of so many `steps`) ends with a row."""
        return step % self._every == 0 or step == self._last

    def begin_step(self, step: int) -> bool:
        """`detailed`, and if so watch what the layers give out until `before_step`."""
        if self.detailed(step):
            self._signals.start()
        return self.detailed(step)

    def before_step(self, step: int) -> Weights | None:
        """Copies of the trained weights at a detailed step."""
        if not self.detailed(step):
            return None
        self._signals.stop()
        return tuple(None if p.grad is None else p.detach().clone() for p in self._parameters)

    def after_step(self, step: Step, *, before: Weights | None) -> Row | None:
        """Take a step's numbers; the row of `steps.csv` where `before` was given."""
        self._count_time(step)
        pending = self._pending
        pending["images"] += step.images
        pending["loss"] += step.loss * step.images
        pending["right"] += step.right
        if not step.taken:
            return None
        pending["taken"] += 1
        pending["norm"] += step.gradient_norm
        pending["norm_max"] = max(pending["norm_max"], step.gradient_norm)
        if before is None:
            return None
        stages = {
            **self._gradient_norms(step.gradient_norm),
            **self._update_ratios(before),
            **self._signals.read(),
        }
        if "update_ratio" in stages:
            self._count_ratio(step.epoch, stages["update_ratio"])
        return self._add({**self._flush(step, number=step.number), **stages})

    def fail_step(self, step: Step) -> None:
        """Write down a step whose loss or gradient norm is no number, with which the run ends."""
        self._signals.stop()
        if self._pending["images"]:
            self._add(self._flush(step, number=step.number - 1))
        row: dict[str, float | int | str] = {
            "step": step.number, "epoch": step.epoch, "loss": step.loss, "gradient_norm": step.gradient_norm,
        }  # fmt: skip
        self._add({**row, **_rates(step.rates)})

    def epoch_metrics(self, epoch: int) -> Row:
        """What `metrics.csv` gets of an epoch: the mean update ratio of its detailed steps."""
        ratios = self._ratios
        if ratios.get("epoch") != epoch:
            return {}
        return {"update_ratio": ratios["sum"] / ratios["steps"]}

    def epoch_timings(self, epoch: int) -> Row:
        """What `timings.csv` gets of the part of an epoch that this process has trained."""
        clock = self._clock
        if clock.get("epoch") != epoch:
            return {}
        device = {}
        if torch.cuda.is_available():
            device = {"gpu_memory_mb": torch.cuda.max_memory_allocated() / 2**20}
        return {
            "seconds": clock["seconds"],
            "images_per_second": clock["images"] / max(clock["seconds"], 1e-9),
            "data_wait_seconds": clock["waited"],
            "augment_seconds": clock["augmented"],
            "memory_mb": _memory_mb(),
            **device,
        }

    @staticmethod
    def speed(step: Step) -> dict[str, float]:
        """Curves of a step that belong to the machine, so to no file that equal runs have in common."""
        return {
            "images_per_second": step.images / max(step.seconds, 1e-9),
            "data_wait_seconds": step.waited,
            "augment_seconds": step.augmented,
            "memory_mb": _memory_mb(),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run writes the same rows; JSON-able."""
        length = 0
        if self._file is not None and self._begun:
            with self._file.open("rb+") as stream:
                os.fsync(stream.fileno())
                length = stream.seek(0, os.SEEK_END)
        return {"bytes": length, "pending": dict(self._pending), "ratios": dict(self._ratios)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: rows that were written after it leave `steps.csv`."""
        self._pending, self._ratios = dict(state["pending"]), dict(state["ratios"])
        if self._file is None:
            return
        if not state["bytes"]:
            self._file.unlink(missing_ok=True)
            return
        kept = self._file.read_bytes()[: state["bytes"]] if self._file.exists() else b""
        if len(kept) < state["bytes"]:
            note(f"{self._file} is shorter than it was: its lost rows are missing from the diagnosis too")
            kept = kept[: kept.rfind(b"\n") + 1] or csv_text((), self._columns, header=True).encode()
        write_bytes(self._file, kept)
        self._begun, self.rows = True, read_rows(kept.decode())

    def _add(self, row: Row) -> Row:
        header = csv_text((), self._columns, header=True)
        line = csv_text([row], self._columns, header=False)
        if self._file is not None:
            with self._file.open("a" if self._begun else "w", encoding="utf-8", newline="") as stream:
                stream.write(line if self._begun else header + line)
        self._begun = True
        # As the file has it, so that a resumed run, which reads the file, has the same rows.
        (kept,) = read_rows(header + line)
        self.rows.append(kept)
        return kept

    def _flush(self, step: Step, *, number: int) -> dict[str, float | int | str]:
        """The means since the row before up to step `number`, and start anew."""
        pending, self._pending = self._pending, _nothing()
        return {
            "step": number,
            "epoch": step.epoch,
            "loss": pending["loss"] / pending["images"],
            "accuracy": pending["right"] / pending["images"],
            "gradient_norm": pending["norm"] / max(pending["taken"], 1),
            "gradient_norm_max": pending["norm_max"],
            **_rates(step.rates),
        }

    def _count_time(self, step: Step) -> None:
        if self._clock.get("epoch") != step.epoch:
            self._clock = {"epoch": step.epoch, **dict.fromkeys(_CLOCKED, 0.0)}
        for name in _CLOCKED:
            self._clock[name] += getattr(step, name)

    def _count_ratio(self, epoch: int, ratio: float) -> None:
        if self._ratios.get("epoch") != epoch:
            self._ratios = {"epoch": epoch, "sum": 0.0, "steps": 0}
        self._ratios["sum"] += ratio
        self._ratios["steps"] += 1

    def _gradient_norms(self, unclipped: float) -> dict[str, float]:
        """Norm of each stage's gradient; clipping, which shrank all of them alike, is undone."""
        norms = {
            name: _norm([p.grad for p in parameters if p.grad is not None])
            for name, parameters in self._stages.items()
            if any(p.grad is not None for p in parameters)
        }
        clipped = math.hypot(*norms.values())
        factor = unclipped / clipped if clipped > 0 else 1.0
        return {f"gradient_norm/{name}": norm * factor for name, norm in norms.items()}

    def _update_ratios(self, before: Weights) -> dict[str, float]:
        """|change| / |weights| of a step: over all, and of each stage that is trained."""
        ratios: dict[str, float] = {}
        changes, sizes, olds = [], [], iter(before)
        for name, parameters in self._stages.items():
            pairs = [(p.detach(), old) for p, old in zip(parameters, olds, strict=False) if old is not None]
            if not pairs:
                continue
            old = [before for _, before in pairs]
            change = _norm(torch._foreach_sub([now for now, _ in pairs], old))
            size = _norm(old)
            changes.append(change)
            sizes.append(size)
            if size > 0:
                ratios[f"update_ratio/{name}"] = change / size
        whole = math.hypot(*sizes)
        return {"update_ratio": math.hypot(*changes) / whole, **ratios} if whole > 0 else {}


def _memory_mb() -> float:
    """Resident memory of this process."""
    return float(psutil.Process().memory_info().rss / 2**20)


def _nothing() -> dict[str, float]:
    return {"images": 0, "loss": 0.0, "right": 0.0, "taken": 0, "norm": 0.0, "norm_max": 0.0}


def _rates(rates: Sequence[float]) -> dict[str, float]:
    return {"learning_rate": max(rates), "learning_rate_least": min(rates)}


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    """The Euclidean norm of all of them as one vector."""
    return float(torch.stack(torch._foreach_norm(list(tensors))).norm())


def _stages(classifier: Classifier) -> dict[str, tuple[nn.Parameter, ...]]:
    """Name and parameters of every stage from the input to the output, the head last."""
    backbone = {stage.name: stage.parameters for stage in stages(classifier)}
    return {**backbone, "head": tuple(head_of(classifier).layer.parameters())}
