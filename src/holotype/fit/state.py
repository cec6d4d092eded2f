"""A run as a checkpoint: the states of its tools and its position, there and back without a changed bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from holotype.fit.checkpoint import (
    Checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from holotype.fit.judging import merge_counts
from holotype.fit.run import Best, Position, Tools
from holotype.head import Scores
from holotype.runlog import RunLog

__all__ = ["restore", "save"]

_COUNTED = ("epoch", "step", "waiting", "overflows", "stopped", "sums")
_PARTS = ("model", "average", "best", "optimizer")


def save(folder: Path, tools: Tools, position: Position, *, log: RunLog) -> None:
    """Write a checkpoint of the run; every process must call it, the first one writes."""
    merge_counts(position, tools.processes)
    if not tools.processes.first:
        return
    moments, hyper = pack_optimizer(tools.optimizer)
    parts = {"model": tools.classifier.network.state_dict(), "optimizer": moments}
    if tools.average is not None:
        parts["average"] = tools.judged.network.state_dict()
    best = position.best
    if best is not None:
        parts["best"] = best.state
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    tensors["losses"] = torch.from_numpy(position.losses)
    tensors["confusion"] = torch.from_numpy(position.confusion)
    if best is not None:
        tensors["best_logits"] = torch.from_numpy(best.logits)
    scaler = tools.accelerator.scaler
    state = {
        **{name: getattr(position, name) for name in _COUNTED},
        "best": None if best is None else asdict(best.scores),
        "tuned": None if position.tuned is None else asdict(position.tuned),
        "optimizer": hyper,
        "schedule": tools.schedule.state(),
        "monitor": tools.monitor.state(),
        "broken": list(position.broken.items()),
        "scaler": None if scaler is None else scaler.state_dict(),
        "metrics": [dict(row) for row in log.metrics],
        "timings": [dict(row) for row in log.timings],
    }
    save_checkpoint(folder, Checkpoint(tensors, state))


def restore(checkpoint: Checkpoint, tools: Tools, position: Position) -> None:
    """Put a run back where `save` found it; the log is restored from `checkpoint.state` by the caller."""
    state = checkpoint.state
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    for key, value in checkpoint.tensors.items():
        part, slash, name = key.partition("/")
        if slash:
            parts[part][name] = value
    tools.classifier.network.load_state_dict(parts["model"])
    if tools.average is not None:
        tools.judged.network.load_state_dict(parts["average"])
    unpack_optimizer(tools.optimizer, parts["optimizer"], state["optimizer"])
    tools.schedule.load(state["schedule"])
    tools.monitor.restore(state["monitor"])
    if tools.accelerator.scaler is not None and state["scaler"]:
        tools.accelerator.scaler.load_state_dict(state["scaler"])
    for name in _COUNTED:
        setattr(position, name, state[name])
    position.broken.update({int(row): error for row, error in state["broken"]})
    if state["best"] is not None:
        logits = checkpoint.tensors["best_logits"].numpy()
        position.best = Best(parts["best"], Scores(**state["best"]), logits)
    # A run of a version that counted against the best of all, the head too, goes on as it began.
    tuned = state.get("tuned", state["best"])
    position.tuned = None if tuned is None else Scores(**tuned)
    if tools.processes.first:
        position.losses[:] = checkpoint.tensors["losses"].numpy()
        position.confusion[:] = checkpoint.tensors["confusion"].numpy()
    else:
        position.forget()
