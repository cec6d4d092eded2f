"""`holotype train`: from a dataset to a run folder with a measured, exported, parity-checked bundle."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holotype.baseline import write_baseline
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
from holotype.calibrate import fit_policy
from holotype.config import Preset, TrainConfig, resolve_config, to_yaml
from holotype.dataset import dataset_name
from holotype.diagnosis import diagnose, looked_for
from holotype.errors import ConfigError
from holotype.fit import Learned, Session, computed_features, fit_session_head, learn
from holotype.fit.evidence import evidence_of
from holotype.fit.folder import Run, alone, begin_run, record_end, resume_run
from holotype.fit.memory import naming_memory
from holotype.fit.processes import losing_none
from holotype.head import HeadFit
from holotype.machine import available_cores
from holotype.models import head_of, load_weights, save_weights, set_head
from holotype.onnx_export import export_onnx, replace_head
from holotype.parity import Parity, check_parity, choose_golden, sample_rows
from holotype.policy import Policy
from holotype.predictor import load
from holotype.progress import note
from holotype.report import Report
from holotype.runtime import Runtime, load_onnx, torch_runtime
from holotype.scoring import choose_split, evaluate_split

__all__ = ["TrainResult", "train"]

_PARITY_IMAGES = 128


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


@naming_memory()
def train(
    data: Path | str | None = None,
    *,
    name: str | None = None,
    preset: Preset | None = None,
    config: TrainConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    runs: Path | str = "runs",
    device: str | None = None,
    resume: Path | str | None = None,
) -> TrainResult:
    """Train on a class folder or CSV, and end with `runs/name/best` (a bundle) and `runs/name/report.json`.

    Settings are `config`, or else the preset with `overrides` such as `{"fit": {"epochs": 3}}`; `name`
    defaults to that of the data and gets a number where it is taken, `device` to "auto". Ctrl-C while
    fine-tuning saves a checkpoint and finishes the bundle from the best weights so far. `resume` is the
    folder of a run that was interrupted or killed: it goes on with its own data, device and settings, and
    ends as if nothing had happened; `overrides` may then change only what has no part in that. Under
    torchrun or `accelerate launch` all processes train one model. Raises a `HolotypeError` that says what,
    where and the fix.
    """
    begun = time.perf_counter()
    if resume is not None:
        if config is not None or preset is not None:
            raise ConfigError("a resumed run keeps its settings", where=resume, fix="leave them out")
        run = resume_run(Path(resume), data=data, device=device, overrides=overrides or {})
    elif data is None:
        raise ConfigError("no dataset", where="train", fix="name one, or --resume runs/NAME")
    else:
        run = begin_run(
            Path(data),
            _settings(config, preset, overrides),
            name=name or dataset_name(Path(data)),
            runs=Path(runs),
            device=device or "auto",
        )
    processes = run.session.processes
    with alone(run) as scratch, losing_none(processes, resume=f"holotype train --resume {run.folder}"):
        model_file = scratch / "model.onnx"
        learned, exported = _learn(run, model_file)
        result = None
        if processes.first:
            result = _finish(run, learned, scratch, exported=exported, begun=begun)
            record_end(run.folder, finished=not learned.interrupted)
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


def _learn(run: Run, model_file: Path) -> tuple[Learned, bool]:
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


def _feature_runtime(run: Run, model_file: Path) -> Runtime:
    """On a CPU onnxruntime is faster than eager torch, and without fine-tuning no other export is needed."""
    classifier = run.session.classifier
    if run.session.device.type != "cpu":
        return torch_runtime(classifier.eval(), device=str(run.session.device))
    # The exporter leaves a bias of zeros out, and with it the place where the fitted one goes.
    head = head_of(classifier).layer
    set_head(classifier, head.weight, torch.ones_like(head.bias))
    _export(run, model_file)
    return load_onnx(model_file, threads=available_cores())


def _export(run: Run, file: Path) -> None:
    start = time.perf_counter()
    dataset = run.session.dataset
    export_onnx(run.session.classifier, file, classes=dataset.classes, preprocess=dataset.spec)
    run.log.add_timing({"stage": "export", "seconds": time.perf_counter() - start})


def _finish(run: Run, learned: Learned, scratch: Path, *, exported: bool, begun: float) -> TrainResult:
    """The bundle with its proof, and the report of its test split."""
    session = run.session
    bundle, parity = _write_bundle(run, learned, scratch, exported=exported)
    evidence = evidence_of(session, learned, log=run.log)
    report = evaluate_split(
        load(bundle.path),
        session.quarantine.left,
        split=choose_split(session.dataset),
        folder=run.folder,
        history=run.log.metrics,
        diagnosis=diagnose(evidence) if evidence is not None else (),
        looked_for=looked_for(evidence) if evidence is not None else (),
        started=begun,
    )
    return TrainResult(run.folder, bundle, report, parity, learned.interrupted)


def _write_bundle(run: Run, learned: Learned, scratch: Path, *, exported: bool) -> tuple[Bundle, Parity]:
    """Export, pass the parity gate on real images, and write `best` with what proves it."""
    session = run.session
    dataset, classifier = session.dataset, session.classifier.cpu().eval()
    model_file = scratch / "model.onnx"
    if not exported:
        _export(run, model_file)
    onnx = load_onnx(model_file, threads=available_cores())
    fitted = fit_policy(
        onnx,
        dataset,
        classes=dataset.classes,
        config=session.config.policy,
        without=session.quarantine.errors,
    )
    rows = sample_rows(dataset, count=_PARITY_IMAGES, without=session.quarantine.errors)
    images = np.concatenate(list(dataset.pixels([rows])))
    parity = check_parity(
        torch_runtime(classifier, device="cpu"),
        onnx,
        images=images,
        paths=dataset.paths(rows),
        classes=dataset.classes,
        policy=fitted.policy,
    )
    note(
        f"parity gate: {parity.images} images, probabilities within {parity.largest_difference:.1g}, no flips"
    )
    save_weights(classifier, scratch / "weights.safetensors")
    write_text(scratch / "architecture.json", session.architecture.model_dump_json(indent=1))
    write_golden(scratch / "golden.npz", choose_golden(onnx, images))
    write_baseline(scratch / "baseline.npz", fitted.baseline)
    files: dict[PayloadName, Path] = {
        "weights": scratch / "weights.safetensors",
        "architecture": scratch / "architecture.json",
        "onnx": model_file,
        "golden": scratch / "golden.npz",
        "baseline": scratch / "baseline.npz",
    }
    manifest = _manifest(session, learned, fitted.policy)
    return write_bundle(run.folder / "best", manifest, files=files), parity


def _manifest(session: Session, learned: Learned, policy: Policy) -> Manifest:
    dataset, scores = session.dataset, learned.scores
    return Manifest(
        classes=dataset.classes,
        preprocess=dataset.spec,
        policy=policy,
        settings=session.config.model_dump(mode="json"),
        metrics={"validation": {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}},
        lineage=Lineage(
            dataset=str(dataset.source.resolve()),
            dataset_root_hash=dataset.root_hash,
            config_sha256=hashlib.sha256(to_yaml(session.config).encode()).hexdigest(),
        ),
        versions=library_versions(),
    )
