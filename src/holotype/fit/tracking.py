"""Curves of a run: TensorBoard always, MLflow and W&B where they are named, all through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker

from holotype.config import TrainConfig
from holotype.errors import MissingExtraError
from holotype.runlog import Row

__all__ = ["check_trackers", "log_head", "open_accelerator"]

_PROJECT = "holotype"  # of MLflow an experiment, of W&B a project


def check_trackers(names: Sequence[str]) -> None:
    """`MissingExtraError` for one that is not installed: accelerate would leave it out without a word."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"needs the Python package {name!r}",
                where=f"monitor.trackers={name}",
                fix=f"run: pip install {name}",
            )


def open_accelerator(config: TrainConfig, *, device: torch.device, folder: Path | None) -> Accelerator:
    """With trackers that write to `folder`; without one, with none."""
    AcceleratorState._reset_state()  # a second run in this process may use another precision
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[config.fit.precision]
    others = [name for name in dict.fromkeys(config.monitor.trackers) if name != "tensorboard"]
    trackers = [] if folder is None else [TensorBoardTracker("tensorboard", folder), *others]
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        log_with=trackers or None,
        project_dir=folder,
    )
    if folder is not None:
        accelerator.init_trackers(
            _PROJECT,
            config=_flat(config.model_dump(mode="json")) if others else None,
            init_kwargs={
                "mlflow": {"run_name": folder.name},
                "wandb": {"name": folder.name, "dir": str(folder)},
            },
        )
    return accelerator


def log_head(accelerator: Accelerator, metrics: Sequence[Row]) -> None:
    """The penalties that were tried for the head, one step each."""
    for step, row in enumerate(row for row in metrics if row.get("stage") == "head"):
        accelerator.log({f"head/{name}": v for name, v in row.items() if isinstance(v, float)}, step=step)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"fit": {"epochs": 3}}` → `{"fit.epochs": "3"}`."""
    flat: dict[str, str] = {}
    for name, value in nested.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: str(value)}
        flat.update(inner)
    return flat
