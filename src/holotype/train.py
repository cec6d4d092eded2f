"""`holotype train`: from a dataset to a run folder with a measured, exported, parity-checked bundle."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holotype.bundle import (
    Bundle,
    Lineage,
    Manifest,
    PayloadName,
    library_versions,
    write_bundle,
    write_golden,
    write_text,
)
from holotype.config import Preset, TrainConfig, read_recipe, resolve_config, to_yaml
from holotype.dataset import cache_folder, dataset_name
from holotype.diagnosis import Evidence, diagnose, suspect_paths
from holotype.errors import ConfigError, DatasetError
from holotype.fit import Learned, Session, computed_features, fit_session_head, learn, open_session
from holotype.fit.checkpoint import Checkpoint, load_checkpoint
from holotype.fit.processes import losing_none
from holotype.head import HeadFit
from holotype.models import head_of, load_weights, save_weights, set_head
from holotype.onnx_export import export_onnx, replace_head
from holotype.parity import Parity, check_enough, check_parity, choose_golden, sample_rows
from holotype.policy import Policy, fit_temperature
from holotype.predictor import load
from holotype.progress import note
from holotype.report import Finding, Report
from holotype.runlog import Row, RunLog, create_run
from holotype.runtime import Runtime, available_cores, load_onnx, torch_runtime
from holotype.scoring import choose_split, evaluate_split

__all__ = ["TrainResult", "train"]

_PARITY_IMAGES = 128
_RUN = "run.json"


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended up: its folder, its bundle and its report; `first` in one process of several only."""

    folder: Path
    bundle: Bundle
    report: Report
    parity: Parity
    interrupted: bool
    first: bool = True

    @property
    def best(self) -> Path:
        """The bundle's folder."""
        return self.bundle.path


@dataclass(frozen=True)
class _Run:
    """A session with its folder, its log, and the checkpoint that it goes on from."""

    session: Session
    folder: Path
    log: RunLog
    checkpoint: Checkpoint | None


def train(
    data: Path | str | None = None,
    *,
    name: str | None = None,
    preset: Preset | None = None,
    config: TrainConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    runs: Path | str = "runs",
    device: str = "auto",
    resume: Path | str | None = None,
) -> TrainResult:
    """Train on a class folder or CSV, and end with `runs/name/best` (a bundle) and `runs/name/report.json`.

    Settings are `config`, or else the preset with `overrides` such as `{"fit": {"epochs": 3}}`; `name`
    defaults to that of the data and gets a number where it is taken. Ctrl-C while fine-tuning saves a
    checkpoint and finishes the bundle from the best weights so far. `resume` is the folder of a run that was
    interrupted or killed: it goes on with its own data and settings, and ends as if nothing had happened.
    Under torchrun or `accelerate launch` all processes train one model. Raises a `HolotypeError` that says
    what, where and the fix.
    """
    begun = time.perf_counter()
    if resume is not None:
        if config is not None or preset is not None or overrides:
            raise ConfigError("a resumed run keeps its settings", where=resume, fix="leave them out")
        run = _resume(Path(resume), data=data, device=device)
    elif data is None:
        raise ConfigError("no dataset", where="train", fix="name one, or --resume runs/NAME")
    else:
        chosen = _settings(config, preset, overrides)
        run = _begin(
            Path(data), chosen, name=name or dataset_name(Path(data)), runs=Path(runs), device=device
        )
    processes = run.session.processes
    with (
        tempfile.TemporaryDirectory(dir=run.folder, prefix=".work-") as scratch,
        losing_none(processes, resume=f"holotype train --resume {run.folder}"),
    ):
        model_file = Path(scratch) / "model.onnx"
        learned, exported = _learn(run, model_file)
        result = None
        if processes.first:
            result = _finish(run, learned, Path(scratch), exported=exported, begun=begun)
            recorded = json.loads((run.folder / "last" / _RUN).read_text())
            _record(run.folder, {**recorded, "finished": not learned.interrupted})
        result = processes.from_first(result)
    processes.part()
    if result is None:
        raise AssertionError("the first process finished nothing")
    return replace(result, first=processes.first)


def _settings(
    config: TrainConfig | None, preset: Preset | None, overrides: Mapping[str, Any] | None
) -> TrainConfig:
    if config is not None and (preset is not None or overrides):
        raise ConfigError("give either config, or preset and overrides", where="train")
    if config is not None:
        return config
    chosen = {**(overrides or {}), **({"preset": preset} if preset else {})}
    return resolve_config(TrainConfig, overrides=chosen)


def _begin(data: Path, config: TrainConfig, *, name: str, runs: Path, device: str) -> _Run:
    start = time.perf_counter()
    session = open_session(data, config, device=device)
    read: Row = {"stage": "read", "seconds": time.perf_counter() - start}
    _tell(session)
    check_enough(len(session.dataset.table))
    processes = session.processes
    folder = processes.from_first(create_run(runs, name) if processes.first else Path())
    session = replace(session, folder=folder)
    if processes.first:
        write_text(folder / "config.yaml", to_yaml(session.config))
        content = {"data": str(data.resolve()), "root_hash": session.dataset.root_hash, "finished": False}
        (folder / "last").mkdir()
        _record(folder, content)
    fit, spec = session.config.fit, session.spec
    note(
        f"{session.architecture.name} ({session.origin} weights), {spec}, {fit.precision} on {session.device}"
        f" → {folder}"
    )
    log = RunLog(folder if processes.first else None)
    log.add_timing(read)
    return _Run(session, folder, log, None)


def _resume(folder: Path, *, data: Path | str | None, device: str) -> _Run:
    """A run from its last checkpoint, or from its start where it was killed before the first one."""
    try:
        recorded = json.loads((folder / "last" / _RUN).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("is not a run that can be resumed", where=folder, fix="check --resume") from error
    config = resolve_config(TrainConfig, recipe=read_recipe(folder / "config.yaml"))
    if recorded["finished"]:
        raise ConfigError("is finished: there is nothing to resume", where=folder, fix="train anew")
    # A run that was killed before its first checkpoint begins anew.
    checkpoint = load_checkpoint(folder / "last") if any((folder / "last").glob("checkpoint-*")) else None
    source = Path(data) if data is not None else Path(recorded["data"])
    session = replace(open_session(source, config, device=device), folder=folder)
    if session.dataset.root_hash != recorded["root_hash"]:
        raise DatasetError(
            "is not what it was when the run began: files, labels or splits have changed",
            where=source,
            fix="put it back as it was, or train anew",
        )
    at = checkpoint.state if checkpoint is not None else {"epoch": 0, "step": 0}
    note(f"resuming {folder} after step {at['step']} of epoch {at['epoch']}")
    rows = {"metrics": [], "timings": []} if checkpoint is None else checkpoint.state
    log = RunLog.resume(
        folder if session.processes.first else None, metrics=rows["metrics"], timings=rows["timings"]
    )
    return _Run(session, folder, log, checkpoint)


def _record(folder: Path, content: Mapping[str, Any]) -> None:
    """What a run that is resumed must know beside its settings and its checkpoint."""
    write_text(folder / "last" / _RUN, json.dumps(content, indent=1))


def _tell(session: Session) -> None:
    dataset = session.dataset
    sizes = ", ".join(f"{len(dataset.rows(split)):,} {split}" for split in dataset.splits)
    note(f"{len(dataset.table):,} images in {len(dataset.classes)} classes: {sizes}")
    if dataset.deviation:
        label, gap = max(dataset.deviation.items(), key=lambda item: item[1])
        note(f"automatic split; the class furthest from the wanted shares is {label}, by {gap:.1%}")
    if dataset.ignored:
        note(f"passed over {len(dataset.ignored)} files not named like images, first {dataset.ignored[0]}")


def _learn(run: _Run, model_file: Path) -> tuple[Learned, bool]:
    """Both stages. Also says whether `model_file` now holds the classifier as it was learned."""
    session = run.session
    if session.config.fit.epochs:
        learned = learn(session, log=run.log, checkpoint=run.checkpoint)
        if learned.interrupted:
            note(f"go on with: holotype train --resume {run.folder}")
        load_weights(session.classifier, learned.best.state)
        return learned, False
    runtime = _feature_runtime(run, model_file)
    fitted: HeadFit | None = None
    if session.processes.first:
        features = computed_features(
            runtime,
            session.dataset,
            mirror=session.config.augment.flip > 0,
            quarantine=session.quarantine,
            log=run.log,
        )
        fitted = fit_session_head(session, features, log=run.log)
    head = session.processes.from_first(fitted)
    learned = learn(session, log=run.log, head=head)
    return learned, model_file.exists() and replace_head(model_file, session.classifier)


def _feature_runtime(run: _Run, model_file: Path) -> Runtime:
    """On a CPU onnxruntime is faster than eager torch, and without fine-tuning no other export is needed."""
    classifier = run.session.classifier
    if run.session.device.type != "cpu":
        return torch_runtime(classifier.eval(), device=str(run.session.device))
    # The exporter leaves a bias of zeros out, and with it the place where the fitted one goes.
    head = head_of(classifier).layer
    set_head(classifier, head.weight, torch.ones_like(head.bias))
    _export(run, model_file)
    return load_onnx(model_file, threads=available_cores())


def _export(run: _Run, file: Path) -> None:
    start = time.perf_counter()
    dataset = run.session.dataset
    export_onnx(run.session.classifier, file, classes=dataset.classes, preprocess=dataset.spec)
    run.log.add_timing({"stage": "export", "seconds": time.perf_counter() - start})


def _finish(run: _Run, learned: Learned, scratch: Path, *, exported: bool, begun: float) -> TrainResult:
    """The bundle with its proof, and the report of its test split."""
    session = run.session
    bundle, parity = _write_bundle(run, learned, scratch, exported=exported)
    report = evaluate_split(
        load(bundle.path),
        session.dataset,
        split=choose_split(session.dataset),
        folder=run.folder,
        history=run.log.metrics,
        diagnosis=_diagnose(run, learned),
        started=begun,
    )
    return TrainResult(run.folder, bundle, report, parity, learned.interrupted)


def _diagnose(run: _Run, learned: Learned) -> tuple[Finding, ...]:
    """What held the training back; nothing where only a head was fitted."""
    if learned.steps is None:
        return ()
    dataset = run.session.dataset
    doubted = suspect_paths(cache_folder(dataset.source), dataset.root_hash)
    paths = dataset.paths(dataset.rows("train"))
    evidence = Evidence(
        run.session.config,
        metrics=run.log.metrics,
        steps=learned.steps,
        timings=run.log.timings,
        counts=dataset.counts(),
        sample_losses=learned.losses,
        suspects=None if doubted is None else np.array([path in doubted for path in paths]),
    )
    return diagnose(evidence)


def _write_bundle(run: _Run, learned: Learned, scratch: Path, *, exported: bool) -> tuple[Bundle, Parity]:
    """Export, pass the parity gate on real images, and write `best` with what proves it."""
    session = run.session
    dataset, classifier = session.dataset, session.classifier.cpu().eval()
    model_file = scratch / "model.onnx"
    if not exported:
        _export(run, model_file)
    onnx = load_onnx(model_file, threads=available_cores())
    validation = dataset.labels(dataset.rows("validation"))
    policy = Policy(temperature=fit_temperature(learned.best.logits, validation))
    rows = sample_rows(dataset, count=_PARITY_IMAGES, without=session.quarantine.errors)
    images = np.concatenate(list(dataset.pixels([rows])))
    parity = check_parity(
        torch_runtime(classifier, device="cpu"),
        onnx,
        images=images,
        paths=dataset.paths(rows),
        classes=dataset.classes,
        policy=policy,
    )
    note(
        f"parity gate: {parity.images} images, probabilities within {parity.largest_difference:.1g}, no flips"
    )
    save_weights(classifier, scratch / "weights.safetensors")
    write_text(scratch / "architecture.json", session.architecture.model_dump_json(indent=1))
    write_golden(scratch / "golden.npz", choose_golden(onnx, images))
    files: dict[PayloadName, Path] = {
        "weights": scratch / "weights.safetensors",
        "architecture": scratch / "architecture.json",
        "onnx": model_file,
        "golden": scratch / "golden.npz",
    }
    return write_bundle(run.folder / "best", _manifest(session, learned, policy), files=files), parity


def _manifest(session: Session, learned: Learned, policy: Policy) -> Manifest:
    dataset, scores = session.dataset, learned.scores
    return Manifest(
        classes=dataset.classes,
        preprocess=dataset.spec,
        policy=policy,
        metrics={"validation": {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}},
        lineage=Lineage(
            dataset=str(dataset.source.resolve()),
            dataset_root_hash=dataset.root_hash,
            config_sha256=hashlib.sha256(to_yaml(session.config).encode()).hexdigest(),
        ),
        versions=library_versions(),
    )
