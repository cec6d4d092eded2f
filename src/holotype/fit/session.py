"""Both stages of training alone: `train` adds export, gate and report to them, `tune` the search."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from holotype.config import TrainConfig
from holotype.dataset import Dataset, Shape, margin_shape, open_dataset
from holotype.errors import ConfigError
from holotype.fit.batches import Feed
from holotype.fit.checkpoint import Checkpoint
from holotype.fit.convolution import faster_convolutions
from holotype.fit.freeze import apply_freezing
from holotype.fit.loop import Best, Learned, Plan, Position, Tools, Watch, fine_tune, prepare_tools
from holotype.fit.loss import criterion
from holotype.fit.memory import keep_freed_memory, naming_memory, settle_micro_batch
from holotype.fit.monitor import Monitor
from holotype.fit.precision import choose_compile, choose_precision
from holotype.fit.processes import Processes, join_processes
from holotype.fit.quarantine import Quarantine
from holotype.fit.sampling import draw_weights
from holotype.fit.state import restore, save
from holotype.fit.teacher import open_teacher
from holotype.head import HeadFit, batches_of, extract_features, fit_head
from holotype.imbalance import settle
from holotype.models import (
    Architecture,
    Classifier,
    choose_device,
    input_spec,
    pretrained,
    recipe_of,
    set_head,
)
from holotype.preprocess import Preprocess
from holotype.progress import note
from holotype.runlog import RunLog
from holotype.runtime import Runtime, torch_runtime

__all__ = ["Session", "fit_session_head", "learn", "open_session"]

_FEATURE_BATCH = 8  # on CPUs as fast as larger ones, in less memory


@dataclass(frozen=True)
class Session:
    """What is settled before the first image is learned from.

    `config` has no "auto" left that decides a result.

    `folder` is the run's, None where nothing is to be written.
    """

    config: TrainConfig
    folder: Path | None
    dataset: Dataset
    architecture: Architecture
    classifier: Classifier
    origin: str
    device: torch.device
    processes: Processes

    @property
    def spec(self) -> Preprocess:
        return self.dataset.spec

    @cached_property
    def quarantine(self) -> Quarantine:
        """The training images that broke since the dataset was read."""
        return Quarantine(self.dataset, allowed=self.config.data.max_unreadable)

    @property
    def draw_weights(self) -> npt.NDArray[np.float64] | None:
        """How often each training image is drawn against the others, `float64[N]`; None: equally."""
        fit, rows = self.config.fit, self.dataset.rows("train")
        counts = _counts(self.dataset)
        labels, paths = self.dataset.labels(rows), self.dataset.paths(rows)
        return draw_weights(labels, paths, config=fit, imbalance=settle(fit.imbalance, counts), counts=counts)


def open_session(
    data: Path, config: TrainConfig, *, device: str = "auto", folder: Path | None = None
) -> Session:
    """Read the dataset, build the network and settle what is measured; `HolotypeError` where it cannot be."""
    keep_freed_memory()
    chosen = choose_device(device)
    processes = join_processes(cpu=chosen.type == "cpu")
    torch.manual_seed(config.fit.seed)
    torch.use_deterministic_algorithms(config.fit.deterministic)
    spec = input_spec(config.model, config.data)
    config = _settle(config)
    with processes.first_goes_first():
        dataset = open_dataset(data, spec=spec, config=config.data, shapes=_views(config, spec))
    architecture = _architecture(config, spec, classes=len(dataset.classes))
    classifier, origin = pretrained(architecture, weights=config.model.weights)
    fit = config.fit
    if fit.epochs:
        size = fit_shape(config, spec)
        precision = processes.from_first(choose_precision(classifier, fit, size=size, device=chosen))
        compiled = processes.from_first(
            choose_compile(classifier, fit, size=size, device=chosen, precision=precision)
        )
        fit = fit.model_copy(update={"precision": precision, "compile": compiled})
    else:
        fit = fit.model_copy(update={"precision": "fp32", "compile": False})
    fit = fit.model_copy(update={"imbalance": settle(fit.imbalance, _counts(dataset))})
    return Session(
        config=config.model_copy(update={"fit": fit}),
        folder=folder,
        dataset=dataset,
        architecture=architecture,
        classifier=classifier,
        origin=origin,
        device=chosen,
        processes=processes,
    )


def learn(
    session: Session,
    *,
    log: RunLog | None = None,
    head: HeadFit | None = None,
    checkpoint: Checkpoint | None = None,
    watch: Watch | None = None,
) -> Learned:
    """Fit the head and fine-tune, or go on from `checkpoint`; the best weights are in the result.

    `head` is one that was fitted before, on features of this session's classifier.
    """
    log = log or RunLog(None)
    start: Best | None = None
    if checkpoint is None:
        start = _start(session, head, log=log)
        if start is not None and watch is not None and session.processes.from_first(watch(0, start.scores)):
            return Learned(start)
    if not session.config.fit.epochs:
        if start is None:
            raise AssertionError("neither a head nor epochs")
        return Learned(start)
    return _fine_tune(session, start, checkpoint=checkpoint, log=log, watch=watch)


def fit_session_head(session: Session, runtime: Runtime, *, log: RunLog) -> HeadFit:
    """Stage 1: features of the frozen backbone, and the head that is best on validation.

    Where the head is all that is learned it also gets the features of mirrored images.
    """
    dataset, config = session.dataset, session.config
    rows = {"train": dataset.rows("train"), "validation": dataset.rows("validation")}
    batches = {split: list(batches_of(part, size=_FEATURE_BATCH)) for split, part in rows.items()}
    start = time.perf_counter()
    features = {
        "train": extract_features(
            runtime,
            dataset.pixels(batches["train"], instead=session.quarantine),
            dataset.labels(rows["train"]),
            mirror=config.augment.flip > 0 and not config.fit.epochs,
            label="features of train",
        ),
        "validation": extract_features(
            runtime,
            dataset.pixels(batches["validation"]),
            dataset.labels(rows["validation"]),
            mirror=False,
            label="features of validation",
        ),
    }
    count = sum(len(part.labels) for part in features.values())
    seconds = time.perf_counter() - start
    log.add_timing({"stage": "features", "seconds": seconds, "images_per_second": count / seconds})
    note(f"{count:,} features by {runtime.name}, {count / seconds:.0f} images/s")
    head = fit_head(
        features["train"],
        features["validation"],
        classes=session.architecture.classes,
        config=config.fit,
        log=log,
        names=dataset.classes,
        weights=session.draw_weights,
    )
    set_head(session.classifier, head.weight, head.bias)
    note(f"head on frozen features: {head.scores.accuracy:.1%} accuracy on validation")
    return head


def _settle(config: TrainConfig) -> TrainConfig:
    """Settings whose "auto" depends on whether the weights have learned anything."""
    fresh = config.model.weights == "none"
    if fresh and not config.fit.epochs:
        raise ConfigError(
            "a head on a backbone of random weights tells nothing",
            where="model.weights=none with fit.epochs=0",
            fix="use weights, or fine-tune: --preset balanced",
        )
    fit = config.fit
    update: dict[str, Any] = {}
    if fit.unfreeze == "auto":
        update["unfreeze"] = "all" if fresh or fit.freeze is not None else "most"
    if fit.freeze_norm == "auto":
        update["freeze_norm"] = not fresh
    if fit.scale == "auto":
        update["scale"] = 1.0 if fresh or recipe_of(config.model.name).fixed_size else 0.8
    return config.model_copy(update={"fit": fit.model_copy(update=update)})


def _counts(dataset: Dataset) -> npt.NDArray[np.int64]:
    """Training images of each class, `int64[C]`."""
    labels = dataset.labels(dataset.rows("train"))
    return np.bincount(labels, minlength=len(dataset.classes)).astype(np.int64)


def _architecture(config: TrainConfig, spec: Preprocess, *, classes: int) -> Architecture:
    recipe, model = recipe_of(config.model.name), config.model
    return Architecture(
        name=model.name,
        classes=classes,
        height=spec.height,
        width=spec.width,
        mean=recipe.mean,
        std=recipe.std,
        dropout=model.dropout,
        drop_path=model.drop_path,
        attention=model.attention,
        stem=model.stem,
    )


def fit_shape(config: TrainConfig, spec: Preprocess, *, epoch: int | None = None) -> Shape:
    """The size of images in an epoch of fine-tuning (None: the last): a multiple of 16, or its own."""
    fit = config.fit
    scale = float(fit.scale)
    if epoch is not None and fit.scale_start is not None and fit.epochs > 1:
        # Growing over the first half, so that the second sees the size it is judged at.
        progress = min(2 * (epoch - 1) / fit.epochs, 1.0)
        scale = fit.scale_start + (scale - fit.scale_start) * progress
    if scale == 1:
        return Shape(spec.height, spec.width)
    return Shape(*(max(16 * round(side * scale / 16), 16) for side in (spec.height, spec.width)))


def _views(config: TrainConfig, spec: Preprocess) -> tuple[Shape, ...]:
    """The view that training crops are taken from; none where nothing is fine-tuned."""
    if not config.fit.epochs:
        return ()
    return (margin_shape(fit_shape(config, spec), crop=config.augment.crop),)


def _start(session: Session, head: HeadFit | None, *, log: RunLog) -> Best | None:
    """The network with a fitted head; None where its weights are random: no head is worth fitting on them."""
    if session.config.model.weights == "none":
        return None
    if head is None:
        fitted = None
        if session.processes.first:
            runtime = torch_runtime(session.classifier.eval(), device=str(session.device))
            fitted = fit_session_head(session, runtime, log=log)
        head = session.processes.from_first(fitted)
        if head is None:
            raise AssertionError("the first process fitted no head")
    set_head(session.classifier, head.weight, head.bias)
    state = {name: value.detach().clone() for name, value in session.classifier.network.state_dict().items()}
    return Best(state, head.scores, head.logits)


def _fine_tune(
    session: Session,
    start: Best | None,
    *,
    checkpoint: Checkpoint | None,
    log: RunLog,
    watch: Watch | None,
) -> Learned:
    accelerator = _accelerator(session)
    plan = _plan(session)
    session.classifier.to(session.device).to(memory_format=torch.channels_last)
    if session.config.fit.compile:
        session.classifier.compile()
    note(apply_freezing(session.classifier, plan.config.fit, epoch=1).summary)
    folder = session.folder if session.processes.first else None
    tools = prepare_tools(
        session.classifier,
        plan,
        monitor=Monitor(session.classifier, session.config.monitor, folder=folder),
        accelerator=accelerator,
        processes=session.processes,
    )
    classes, images = len(session.dataset.classes), len(plan.feed.rows)
    position = Position(
        best=start,
        losses=np.full(images, np.nan, dtype=np.float32),
        confusion=np.zeros((classes, classes), dtype=np.int64),
    )
    if checkpoint is not None:
        restore(checkpoint, tools, position)

    def keep(tools: Tools, position: Position) -> None:
        if session.folder is not None:
            save(session.folder / "last", tools, position, log=log)

    try:
        if checkpoint is None:
            keep(tools, position)
        with naming_memory(micro_batch=plan.feed.micro_batch), faster_convolutions(session.classifier):
            return fine_tune(tools, plan, position, log=log, save=keep, watch=watch)
    finally:
        # Not end_training: that would also part from the other processes.
        for tracker in accelerator.trackers:
            tracker.finish()
        gc.collect()


def _plan(session: Session) -> Plan:
    config, dataset = session.config, session.dataset
    fit = config.fit
    size, counts = fit_shape(config, session.spec), _counts(dataset)
    processes = session.processes
    micro_batch = settle_micro_batch(
        session.classifier, fit, size=size, device=session.device, processes=processes.count
    )
    feed = Feed(
        dataset=dataset,
        view=_views(config, session.spec)[0],
        augment=config.augment,
        fit=fit,
        weights=session.draw_weights,
        micro_batch=processes.from_first(micro_batch),
        quarantine=session.quarantine,
    )
    return Plan(
        config=config,
        feed=feed,
        size=lambda epoch: fit_shape(config, session.spec, epoch=epoch),
        criterion=criterion(
            fit,
            imbalance=settle(fit.imbalance, counts),
            counts=counts,
            classes=dataset.classes,
            device=session.device,
        ),
        teacher=open_teacher(config.distill, classes=dataset.classes, size=size, device=session.device),
        folder=session.folder if session.processes.first else None,
    )


def _accelerator(session: Session) -> Accelerator:
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[session.config.fit.precision]
    AcceleratorState._reset_state()  # a second run in this process may use another precision
    trackers = list(dict.fromkeys(("tensorboard", *session.config.monitor.trackers)))
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=session.device.type == "cpu",
        log_with=trackers if session.folder is not None else None,
        project_dir=session.folder,
    )
    if session.folder is not None:
        accelerator.init_trackers("tensorboard")
    return accelerator
