"""Training that gives back what compression took, taught by the uncompressed network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holotype.bundle import Bundle
from holotype.compress.judge import logits_of
from holotype.config import DatasetConfig, TrainConfig, resolve_config
from holotype.dataset import LAYOUT
from holotype.fit import Best, Learned, Session, learn, open_session
from holotype.fit.checkpoint import load_checkpoint
from holotype.head import score_logits
from holotype.models import Architecture, Classifier, load_weights, weights_of
from holotype.runtime import torch_runtime

__all__ = ["open_recovery", "recover", "settings_for", "teach"]

# Shares of the teacher in the loss: a compressed network is to answer as its parent does.
_TEACHER = {"weight": 0.7, "temperature": 2.0}


def settings_for(source: Bundle, *, data: DatasetConfig, epochs: int, seed: int) -> TrainConfig:
    """How `source` was trained, as far as its manifest says, for a few epochs of what is made of it.

    Images have the size that is deployed, every layer learns, batch-norm statistics stay or are learned as
    they were then, and `source` is the teacher.
    """
    spec = source.manifest.preprocess
    fit: dict[str, Any] = {
        "epochs": epochs, "seed": seed, "scale": 1.0, "scale_start": None, "unfreeze": "all", "freeze": None,
        "gradual": 0, "patience": epochs, "focus": None,
    }  # fmt: skip
    own = {
        "fit": fit,
        "data": data.model_dump(mode="json", exclude_unset=True)
        | {"size": spec.height, "resize": spec.resize},
        "model": {"name": _architecture(source).name, "weights": "none", "dropout": 0.0, "drop_path": 0.0},
        "distill": {"teacher": str(source.path), **_TEACHER},
        "monitor": {"trackers": []},
    }
    before = {name: value for name, value in source.manifest.settings.items() if name != "data"}
    # Labels as they are decided now, layout and splits of the images that are used now: not those of then.
    told = source.manifest.settings.get("data", {})
    read = {key: value for key, value in told.items() if key not in {"revision", "split_revision", *LAYOUT}}
    if source.manifest.settings.get("fit", {}).get("precision") in ("bf16", "fp16"):
        fit["precision"] = "auto"  # what was fastest for other shapes can be the slowest for these
    return resolve_config(TrainConfig, recipe={**before, "data": read}, overrides=own)


def open_recovery(
    source: Path, network: Classifier, config: TrainConfig, *, folder: Path, device: str
) -> Session:
    """A session that goes on from `network` on the dataset at `source`; checkpoints go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return open_session(source, config, device=device, network=network, folder=folder)


def recover(session: Session) -> Learned:
    """Fine-tune from what the session's network is; never worse on validation than what it began with.

    The network has the best weights afterwards. Interrupted, the next call goes on from the last checkpoint.
    """
    runtime = torch_runtime(session.classifier.eval(), device=str(session.device))
    rows = session.dataset.rows("validation")
    logits = logits_of(runtime, session.dataset, rows)
    scores = score_logits(logits, session.dataset.labels(rows))
    return teach(session, start=Best(weights_of(session.classifier), scores, logits))


def teach(session: Session, *, start: Best | None = None) -> Learned:
    """`learn`, going on from the last checkpoint in the session's folder where there is one.

    `KeyboardInterrupt` where somebody asked to stop: a checkpoint is written by then.
    """
    if session.folder is None:
        raise AssertionError("a session that learns again has a folder")
    last = session.folder / "last"
    checkpoint = load_checkpoint(last) if any(last.glob("checkpoint-*")) else None
    learned = learn(session, start=start, checkpoint=checkpoint)
    if learned.interrupted:
        raise KeyboardInterrupt
    load_weights(session.classifier, learned.best.state)
    return learned


def _architecture(source: Bundle) -> Architecture:
    file, _ = source.network_files(purpose=" to train", fix="compress what train wrote")
    return Architecture.model_validate_json(file.read_text())
