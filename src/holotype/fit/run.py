"""What a run consists of: its plan, its tools, its position, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3

from holotype.config import TrainConfig
from holotype.dataset import Shape
from holotype.fit.batches import Feed
from holotype.fit.monitor import Monitor, Step
from holotype.fit.processes import Processes
from holotype.fit.schedule import Schedule
from holotype.fit.teacher import Teacher
from holotype.head import Floats, Scores
from holotype.loss import Criterion
from holotype.models import Classifier
from holotype.runlog import Row

__all__ = ["Best", "Learned", "Plan", "Position", "Tools", "Watch"]

State = dict[str, torch.Tensor]

Watch = Callable[[int, Scores], bool]
"""Called with each epoch and its scores on validation (0: the head); True stops the run."""


@dataclass(frozen=True)
class Plan:
    """What the loop works on: batches, their size in each epoch, the loss, and the settings.

    `folder` is the run's, in the process that writes; `go_on` says in every process how to go on with it.
    """

    config: TrainConfig
    feed: Feed
    size: Callable[[int], Shape]
    criterion: Criterion
    teacher: Teacher | None
    folder: Path | None
    go_on: str

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.feed.rows) / self.config.fit.batch_size)

    def number(self, position: Position) -> int:
        """How many optimizer steps of the run come before the next one."""
        return (position.epoch - 1) * self.steps + position.step


@dataclass(frozen=True)
class Best:
    """The weights that are best so far, and their scores and logits `float32[N, C]` on validation."""

    state: State
    scores: Scores
    logits: Floats


@dataclass(frozen=True)
class Learned:
    """What training ended with, and what was seen on the way; `interrupted` by Ctrl-C or SIGTERM.

    `losses: float32[N]` are -ln of the label's probability for the training images in the last epoch, NaN
    where not shown; `steps` the rows of steps.csv; both None where nothing was fine-tuned. `recall` is the
    accuracy of the last weights on training images as validation shows them, None where it was not asked.
    """

    best: Best
    interrupted: bool = False
    losses: npt.NDArray[np.float32] | None = None
    steps: Sequence[Row] | None = None
    recall: float | None = None

    @property
    def scores(self) -> Scores:
        """Of the best weights, on validation."""
        return self.best.scores


@dataclass(frozen=True)
class Tools:
    """What is trained and what trains it; a checkpoint holds their states."""

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    average: ModelEmaV3 | None
    monitor: Monitor
    accelerator: Accelerator
    processes: Processes

    @property
    def judged(self) -> Classifier:
        """The network that validation sees: the averaged one where there is one."""
        return cast("Classifier", self.average.module) if self.average is not None else self.classifier

    @property
    def rates(self) -> list[float]:
        """The learning rate of every parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]


@dataclass
class Position:
    """How far a run is, and what it has seen: everything beside the tools that the next step depends on.

    `step` counts optimizer steps within the epoch. `losses: float32[N]` are of the training images (NaN
    where not shown in this epoch), `confusion: int64[C, C]` of what was trained on in it, `broken` the
    rows of images that broke, and how. `best` may be what fine-tuning began with; `tuned` are the best scores
    of fine-tuning itself, against which `waiting` counts epochs: one that first loses something of a good
    head and then gets better with every epoch is not standing still.
    """

    best: Best | None
    losses: npt.NDArray[np.float32]
    confusion: npt.NDArray[np.int64]
    broken: dict[int, str] = field(default_factory=dict)
    epoch: int = 1
    step: int = 0
    tuned: Scores | None = None
    waiting: int = 0
    overflows: int = 0
    stopped: bool = False
    sums: dict[str, float] = field(default_factory=dict)

    def count(self, step: Step) -> None:
        """Add a step to the epoch's sums."""
        self.step += 1
        added = {"loss": step.loss * step.images, "right": step.right, "seen": step.images}
        if step.taken:
            added |= {"norm": step.gradient_norm, "taken": 1}
        for name, value in added.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def forget(self) -> None:
        """Begin the epoch's losses and confusion anew."""
        self.losses[:] = np.nan
        self.confusion[:] = 0
