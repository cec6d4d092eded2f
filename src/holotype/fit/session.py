"""Both stages of training alone: `train` adds export, gate and report to them, `tune` the search."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from accelerate import Accelerator

from holotype.config import FitConfig, ModelConfig, TrainConfig
from holotype.dataset import Dataset, Shape, cache_folder, check_splits, open_dataset
from holotype.embeddings import Backbone
from holotype.fit.batches import Feed
from holotype.fit.checkpoint import Checkpoint
from holotype.fit.convolution import faster_convolutions
from holotype.fit.features import Splits, computed_features, remembered_features
from holotype.fit.freeze import apply_freezing
from holotype.fit.loop import fine_tune, prepare_tools
from holotype.fit.memory import keep_freed_memory, naming_memory
from holotype.fit.optimizer import build_optimizer
from holotype.fit.processes import Processes, join_processes
from holotype.fit.quarantine import Quarantine, regain
from holotype.fit.run import Best, Learned, Plan, Position, Tools, Watch
from holotype.fit.sampling import draw_weights
from holotype.fit.settings import (
    fit_shape,
    fit_shapes,
    idle_settings,
    settle_measured,
    settle_untold,
    views,
)
from holotype.fit.state import restore, save
from holotype.fit.teacher import Teacher, open_teacher
from holotype.fit.tracking import check_trackers, log_head, open_accelerator
from holotype.head import HeadFit, fit_head
from holotype.imbalance import Remedy, read_rule, settle, shown_counts
from holotype.loss import Criterion, criterion
from holotype.models import (
    Architecture,
    Classifier,
    architecture_of,
    choose_device,
    fresh_stem,
    input_spec,
    pretrained,
    set_head,
    weights_of,
)
from holotype.preprocess import Preprocess
from holotype.progress import note
from holotype.runlog import RunLog
from holotype.runtime import torch_runtime

__all__ = ["Session", "fit_session_head", "learn", "open_session"]


@dataclass(frozen=True)
class Session:
    """What is settled before the first image is learned from.

    `config` has no "auto" left that decides a result; `folder` is the run's, None where nothing is to be
    written. `draw_weights: float64[N]` say how often each training image is drawn against the others, None
    equally. `lost` are rows that could not be read any more when the run was resumed, and why.
    """

    config: TrainConfig
    folder: Path | None
    dataset: Dataset
    architecture: Architecture
    classifier: Classifier
    origin: str
    device: torch.device
    processes: Processes
    draw_weights: npt.NDArray[np.float64] | None
    criterion: Criterion
    teacher: Teacher | None
    lost: Mapping[int, str]

    @property
    def spec(self) -> Preprocess:
        return self.dataset.spec

    @property
    def view(self) -> Shape:
        """What training crops are taken from."""
        (view,) = views(self.config, self.spec)
        return view

    @property
    def untaught(self) -> bool:
        """Whether images meet random weights first: no head is worth fitting on what these make of them."""
        return self.config.model.weights == "none" or fresh_stem(self.classifier)

    @cached_property
    def quarantine(self) -> Quarantine:
        """The training images that broke since the dataset was read."""
        return Quarantine(self.dataset, allowed=self.config.data.max_unreadable, lost=self.lost)


def open_session(
    data: Path,
    config: TrainConfig,
    *,
    device: str = "auto",
    folder: Path | None = None,
    network: Classifier | None = None,
    before: pl.DataFrame | None = None,
    focus: Path | None = None,
) -> Session:
    """Read the dataset, build the network and settle what is measured; `HolotypeError` where it cannot be.

    `network` is one to go on from, instead of the one that `config.model` names; the dataset must have its
    number of classes. `before` is the table that the dataset had when the run began which is resumed, and
    `focus` its list of then, read in place of `config.fit.focus`.
    """
    keep_freed_memory()
    chosen = choose_device(device)
    processes = join_processes(cpu=chosen.type == "cpu")
    _seed(config.fit)
    spec = input_spec(config.model, config.data)
    fresh = network is None and _stem_is_fresh(config.model, spec)
    asked, config = config, settle_untold(config, fresh_stem=fresh)
    check_trackers(config.monitor.trackers)
    with processes.first_goes_first():
        dataset = open_dataset(data, spec=spec, config=config.data, shapes=views(config, spec))
    check_splits(dataset, "train", "validation")
    lost: Mapping[int, str] = {}
    if before is not None:
        dataset, lost = regain(dataset, before, allowed=config.data.max_unreadable)
    rows, classes = dataset.rows("train"), dataset.classes
    labels = dataset.labels(rows)
    counts = np.bincount(labels, minlength=len(classes)).astype(np.int64)
    imbalance = _remedy(config.fit, dataset, counts)
    for idle in idle_settings(asked, imbalance=imbalance, images=len(rows)):
        note(idle)
    config = _settled(config, imbalance=imbalance, dataset=dataset)
    if network is None:
        architecture = architecture_of(config.model, spec, classes=len(classes))
        classifier, origin = pretrained(architecture, weights=config.model.weights)
    else:
        architecture, classifier, origin = network.architecture, network, "given"
    # What may refuse its settings is made now: before anything is computed or written.
    drawing = config.fit if focus is None else config.fit.model_copy(update={"focus": str(focus)})
    drawn = draw_weights(labels, dataset.paths(rows), config=drawing, imbalance=imbalance, counts=counts)
    shown = shown_counts(labels, classes=len(classes), weights=drawn)
    loss = criterion(config.fit, imbalance=imbalance, shown=shown, classes=classes, device=chosen)
    teacher = None
    if config.fit.epochs:
        apply_freezing(classifier, config.fit, epoch=1)
        build_optimizer(classifier, config.fit)
        sizes = fit_shapes(config, spec)
        teacher = open_teacher(config.distill, classes=classes, sizes=sizes, device=chosen)
    measured = settle_measured(config, classifier, spec=spec, device=chosen, processes=processes)
    return Session(
        config=config.model_copy(update={"fit": measured}),
        folder=folder,
        dataset=dataset,
        architecture=architecture,
        classifier=classifier,
        origin=origin,
        device=chosen,
        processes=processes,
        draw_weights=drawn,
        criterion=loss,
        teacher=teacher,
        lost=lost,
    )


def _settled(config: TrainConfig, *, imbalance: Remedy, dataset: Dataset) -> TrainConfig:
    """With the remedy that is used, and the revision of the labels: a resumed run is about the labels and
    splits it began with, whatever was decided since."""
    fit = config.fit.model_copy(update={"imbalance": imbalance})
    known = config.data.model_copy(update={"revision": dataset.revision})
    return config.model_copy(update={"data": known, "fit": fit})


def _remedy(fit: FitConfig, dataset: Dataset, counts: npt.NDArray[np.int64]) -> Remedy:
    """What is done about unequal classes: as asked for, or as an audit of exactly this dataset advises."""
    rule = read_rule(cache_folder(dataset.source), dataset.root_hash)
    remedy = settle(fit.imbalance, counts, rule=rule)
    if fit.imbalance == "auto" and rule is not None:
        note(f"fit.imbalance=auto: {remedy}, as the audit of this dataset advises (gates.balance={rule:g})")
    return remedy


def _stem_is_fresh(model: ModelConfig, spec: Preprocess) -> bool:
    """Whether the weights have no first convolution of the size that `model` asks for.

    Only they can tell, and how large images must be read depends on it, before their classes are known.
    """
    if model.weights == "none" or model.stem == "standard":
        return False
    with torch.random.fork_rng(devices=[]):
        return fresh_stem(pretrained(architecture_of(model, spec, classes=2), weights=model.weights)[0])


def _seed(fit: FitConfig) -> None:
    torch.manual_seed(fit.seed)
    if fit.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else CUDA's matrix products refuse
    torch.use_deterministic_algorithms(fit.deterministic)


def learn(
    session: Session,
    *,
    log: RunLog | None = None,
    head: HeadFit | None = None,
    start: Best | None = None,
    checkpoint: Checkpoint | None = None,
    watch: Watch | None = None,
) -> Learned:
    """Fit the head and fine-tune, or go on from `checkpoint`; the best weights are in the result.

    `head` is one that was fitted before, on features of this session's classifier; with `start`, the weights
    that it has and how they were judged, no head is fitted.
    """
    log = log or RunLog(None)
    if checkpoint is None and start is None:
        start = _start(session, head, log=log)
        if start is not None and watch is not None and session.processes.from_first(watch(0, start.scores)):
            return Learned(start)
    if not session.config.fit.epochs:
        if start is None:
            raise AssertionError("neither a head nor epochs")
        with _accelerated(session) as accelerator:
            log_head(accelerator, log.metrics)
        return Learned(start)
    return _fine_tune(session, start, checkpoint=checkpoint, log=log, watch=watch)


def fit_session_head(session: Session, features: Splits, *, log: RunLog) -> HeadFit:
    """Stage 1: the head that is best on validation, also put into the classifier."""
    head = fit_head(
        features.train,
        features.validation,
        classes=session.architecture.classes,
        config=session.config.fit,
        log=log,
        names=session.dataset.classes,
        weights=session.draw_weights,
    )
    set_head(session.classifier, head.weight, head.bias)
    note(f"head on frozen features: {head.scores.accuracy:.1%} accuracy on validation")
    return head


def _start(session: Session, head: HeadFit | None, *, log: RunLog) -> Best | None:
    """The network with a fitted head; None where none is worth fitting."""
    if session.untaught:
        return None
    if head is None:
        fitted = None
        if session.processes.first:
            fitted = fit_session_head(session, _features(session, log), log=log)
        head = session.processes.from_first(fitted)
        if head is None:
            raise AssertionError("the first process fitted no head")
    set_head(session.classifier, head.weight, head.bias)
    return Best(weights_of(session.classifier), head.scores, head.logits)


def _features(session: Session, log: RunLog) -> Splits:
    """Of the pretrained backbone, remembered where it is just that.

    What is remembered differs in the last bits with the batches in which it was asked.
    """
    config, dataset, quarantine = session.config, session.dataset, session.quarantine
    changed = config.model.stem != "standard" or config.model.attention != "none"
    if config.fit.deterministic or changed:
        runtime = torch_runtime(session.classifier.eval(), device=str(session.device))
        return computed_features(runtime, dataset, mirror=False, quarantine=quarantine, log=log)
    backbone = Backbone(config.model, session.spec, str(session.device))
    return remembered_features(backbone, dataset, quarantine=quarantine, log=log)


@contextmanager
def _accelerated(session: Session) -> Iterator[Accelerator]:
    accelerator = open_accelerator(session.config, device=session.device, folder=session.folder)
    try:
        yield accelerator
    finally:
        # Not end_training: that would also part from the other processes.
        for tracker in accelerator.trackers:
            tracker.finish()
        gc.collect()


def _fine_tune(
    session: Session,
    start: Best | None,
    *,
    checkpoint: Checkpoint | None,
    log: RunLog,
    watch: Watch | None,
) -> Learned:
    plan = _plan(session)
    session.classifier.to(session.device).to(memory_format=torch.channels_last)
    if session.config.fit.compile:
        session.classifier.compile()
    classes, images = len(session.dataset.classes), len(plan.feed.rows)
    position = Position(
        best=start,
        losses=np.full(images, np.nan, dtype=np.float32),
        confusion=np.zeros((classes, classes), dtype=np.int64),
        broken=session.quarantine.errors,
    )

    def keep(tools: Tools, position: Position) -> None:
        if session.folder is not None:
            save(session.folder / "last", tools, position, log=log)

    with _accelerated(session) as accelerator:
        tools = prepare_tools(session.classifier, plan, accelerator=accelerator, processes=session.processes)
        if checkpoint is not None:
            restore(checkpoint, tools, position)
        else:
            log_head(accelerator, log.metrics)
            keep(tools, position)
        # A compiler fuses what it needs itself, and would not see through ours.
        faster = nullcontext() if plan.config.fit.compile else faster_convolutions(session.classifier)
        with naming_memory(micro_batch=plan.feed.micro_batch), faster:
            return fine_tune(tools, plan, position, log=log, save=keep, watch=watch)


def _plan(session: Session) -> Plan:
    config, spec = session.config, session.spec
    if config.fit.micro_batch == "auto":
        raise AssertionError("fit.micro_batch is settled when a session is opened")
    feed = Feed(
        dataset=session.dataset,
        view=session.view,
        augment=config.augment,
        fit=config.fit,
        weights=session.draw_weights,
        micro_batch=config.fit.micro_batch,
        quarantine=session.quarantine,
    )
    return Plan(
        config=config,
        feed=feed,
        size=lambda epoch: fit_shape(config, spec, epoch=epoch),
        criterion=session.criterion,
        teacher=session.teacher,
        folder=session.folder if session.processes.first else None,
        go_on="begin again" if session.folder is None else f"holotype train --resume {session.folder}",
    )
