"""Quantization-aware training: the very graph that is deployed learns to live with its rounding.

Starts from the ranges of INT8 after training, with batch norms folded as the file has them. Each epoch ends
in the file itself, judged by the runtime on validation, and what is kept answers as the graph that was
trained: measured, not assumed. Interrupted, it goes on after the last whole epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import onnx
import torch
from torch import nn

from holotype.bundle import write_bytes
from holotype.compress.proof import Proof, prove
from holotype.compress.trainable import TrainableGraph, learned_model
from holotype.config import RoundedConfig
from holotype.dataset import Shape
from holotype.errors import TrainingError
from holotype.fit import Session
from holotype.fit.batches import Batch, Feed, feed_epoch
from holotype.fit.checkpoint import (
    Checkpoint,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from holotype.loss import distilled
from holotype.progress import Tracker, note, track

__all__ = ["Rounded", "train_rounded"]


_SMALLEST = 1e-4  # so that biases which are all 0 learn too


@dataclass(frozen=True)
class Rounded:
    """The best file, its accuracy on validation, after which epoch (0: as it was before), and its proof."""

    model: onnx.ModelProto
    accuracy: float
    epoch: int
    proof: Proof


def train_rounded(
    session: Session,
    model: onnx.ModelProto,
    *,
    original: onnx.ModelProto,
    judge: Callable[[onnx.ModelProto], float],
    config: RoundedConfig,
) -> Rounded:
    """Fine-tune a quantized `model` made of `original`; `judge` gives a file's accuracy on validation.

    The loss is the session's, with its teacher's answers mixed in where it has one. `TrainingError` where it
    is no number, `ModelError` where a file gives other labels than the graph that was trained, before the
    first epoch or after it got better in one.
    """
    graph = TrainableGraph(model, original=original).to(session.device)
    optimizer = _optimizer(graph, config)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    known = _go_on(session, graph, optimizer)
    best, done = known or (Rounded(model, judge(model), 0, prove(graph, model, session.dataset)), 0)
    feed = _feed(session)
    steps = math.ceil(len(feed.rows) / feed.fit.batch_size)
    for epoch in range(done + 1, config.epochs + 1):
        shares = [
            0.5 * (1 + math.cos(math.pi * ((epoch - 1) * steps + step) / (config.epochs * steps)))
            for step in range(steps)
        ]
        name = f"rounding {epoch}/{config.epochs}"
        _epoch(graph, session, feed, epoch=epoch, name=name, optimizer=optimizer, rates=rates, shares=shares)
        tried = learned_model(model, graph)
        accuracy = judge(tried)
        note(f"quantization-aware training, epoch {epoch}/{config.epochs}: {accuracy:.1%} on validation")
        if accuracy > best.accuracy:
            best = Rounded(tried, accuracy, epoch, prove(graph, tried, session.dataset))
        _save(session, graph, optimizer, best, epoch=epoch)
    return best


def _optimizer(graph: TrainableGraph, config: RoundedConfig) -> torch.optim.Optimizer:
    """Rates are relative to the size of what learns.

    With batch norm folded in, weights of one network are twenty times as large as another's, and a step of
    Adam is as long as its rate, whatever they are (as You et al. 2017, LARS, for the layers of one network).
    """
    weights = [
        {"params": [weight], "lr": config.learning_rate * max(_size(weight), _SMALLEST)}
        for weight in graph.weights()
    ]
    scales = [{"params": [scale], "lr": config.scale_rate * _size(scale)} for scale in graph.scales()]
    return torch.optim.AdamW([*weights, *scales], weight_decay=0.0)


def _size(parameter: torch.Tensor) -> float:
    """Root mean square."""
    return float(parameter.detach().square().mean().sqrt())


def _save(
    session: Session, graph: TrainableGraph, optimizer: torch.optim.Optimizer, best: Rounded, *, epoch: int
) -> None:
    """An epoch that is done is not done again."""
    if session.folder is None:
        return
    moments, hyper = pack_optimizer(optimizer)
    parts = {"graph": graph.state_dict(), "optimizer": moments}
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    file = f"best-{best.epoch}.onnx"
    write_bytes(session.folder / file, best.model.SerializeToString())
    state = {
        "epoch": epoch,
        "optimizer": hyper,
        "best": {
            "file": file,
            "accuracy": best.accuracy,
            "epoch": best.epoch,
            "proof": asdict(best.proof),
        },
    }
    save_checkpoint(session.folder / "last", Checkpoint(tensors, state))


def _go_on(
    session: Session, graph: TrainableGraph, optimizer: torch.optim.Optimizer
) -> tuple[Rounded, int] | None:
    """The best file so far and how many epochs were done, from the session's folder; None: it is empty."""
    if session.folder is None or not any((session.folder / "last").glob("checkpoint-*")):
        return None
    checkpoint = load_checkpoint(session.folder / "last")
    parts: dict[str, dict[str, torch.Tensor]] = {"graph": {}, "optimizer": {}}
    for key, value in checkpoint.tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    graph.load_state_dict(parts["graph"])
    unpack_optimizer(optimizer, parts["optimizer"], checkpoint.state["optimizer"])
    best, epoch = checkpoint.state["best"], int(checkpoint.state["epoch"])
    note(f"quantization-aware training goes on after epoch {epoch}")
    model = onnx.load(session.folder / best["file"])
    return Rounded(model, best["accuracy"], best["epoch"], Proof(**best["proof"])), epoch


def _feed(session: Session) -> Feed:
    fit = session.config.fit
    if fit.micro_batch == "auto":
        raise AssertionError("fit.micro_batch is settled when a session is opened")
    return Feed(
        dataset=session.dataset,
        view=session.view,
        augment=session.config.augment,
        fit=fit,
        weights=session.draw_weights,
        micro_batch=fit.batch_size,
        quarantine=session.quarantine,
    )


def _epoch(
    graph: TrainableGraph,
    session: Session,
    feed: Feed,
    *,
    epoch: int,
    name: str,
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    shares: Sequence[float],
) -> None:
    """One pass over the training images; `shares` are of the `rates`, for each step."""
    spec = session.spec
    batches = feed_epoch(
        feed,
        epoch=epoch,
        size=Shape(spec.height, spec.width),
        done=0,
        processes=session.processes,
        device=session.device,
    )
    scales = list(graph.scales())
    graph.train()
    seen, summed, began = 0, 0.0, time.perf_counter()
    with track(name, total=len(feed.rows)) as progress:
        for share, batch in zip(shares, batches, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
            loss = _loss(graph, session, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = float(nn.utils.clip_grad_norm_(graph.parameters(), 1.0))
            told = float(loss.detach())
            if not math.isfinite(told + norm):
                raise TrainingError(
                    f"loss {told:g} in epoch {epoch} of quantization-aware training",
                    fix="use a smaller rate (--set qat.learning_rate=3e-5)",
                )
            optimizer.step()
            with torch.no_grad():
                for scale in scales:
                    scale.clamp_(min=1e-8)
            seen, summed = seen + batch.total, summed + told * batch.total
            _advance(progress, batch.total, loss=summed / seen, speed=seen / (time.perf_counter() - began))


def _loss(graph: TrainableGraph, session: Session, batch: Batch) -> torch.Tensor:
    logits, _ = graph(batch.images)
    losses = session.criterion(logits, batch.targets)
    if session.teacher is not None:
        with torch.no_grad():
            answers = session.teacher(batch.images)
        losses = distilled(losses, logits, answers, config=session.config.distill)
    return (losses * batch.weights).sum() / batch.total


def _advance(progress: Tracker, images: int, *, loss: float, speed: float) -> None:
    progress.advance(images, status=f"loss {loss:.3f}  {speed:.0f} images/s")
