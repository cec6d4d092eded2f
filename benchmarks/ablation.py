"""What each lever of training does: one change at a time to one short run.

    python benchmarks/ablation.py CLOTHING --out ablation.jsonl
    python benchmarks/ablation.py CLOTHING --out finals.jsonl --only base "all blocks" --seeds 0 1 2
    python benchmarks/ablation.py CLOTHING --proxy proxy.csv --teacher RUN --only base distillation
    python benchmarks/ablation.py --report ablation.jsonl

CLOTHING is a class folder with train/ and validation/; test/ is not looked at. The proxy is 160 pixels,
three epochs, crops of at least 0.4 of the area and a mirror. So that one image is not a third of a
point, a fifth of the training images, chosen by hash, are judged together with validation. Every run is
appended to --out, and one that is there already is not repeated. Intervals are paired bootstraps over
the judged images, seeds together; they say nothing about other seeds. A teacher must not have seen the
judged images: it is trained on the file that --proxy keeps.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holotype.config import TrainConfig, merge, parse_assignments, resolve_config
from holotype.fit import Session, learn, open_session
from holotype.runlog import RunLog
from rivals.outcome import mean_difference

BASE = (
    "data.size=160", "fit.scale=1.0", "fit.epochs=3", "fit.patience=100", "augment.preset=light",
    "augment.crop=0.4", "model.dropout=0.0",
)  # fmt: skip

VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "no augmentation": ("augment.preset=none", "augment.crop=1.0"),
    "no mirror": ("augment.flip=0",),
    "crop 0.8": ("augment.crop=0.8",),
    "crop 0.2": ("augment.crop=0.2",),
    "aspect 1.33": ("augment.aspect=1.33",),
    "rotation 30": ("augment.rotation=30",),
    "HSV jitter": ("augment.hue=15", "augment.saturation=0.3", "augment.value=0.3"),
    "noise 0.01-0.05": ("augment.noise=[0.01, 0.05]",),
    "preset standard": ("augment.preset=standard", "augment.crop=0.8"),
    "preset strong": ("augment.preset=strong", "augment.crop=0.5"),
    "erasing 0.25": ("augment.erasing=0.25",),
    "TrivialAugment": ("augment.policy=trivial",),
    "RandAugment 2, 9": ("augment.policy=randaugment",),
    "MixUp 0.2": ("augment.mixup=0.2",),
    "CutMix 1": ("augment.cutmix=1.0",),
    "CutMix 1, half": ("augment.cutmix=1.0", "augment.mixed=0.5"),
    "no smoothing": ("fit.label_smoothing=0",),
    "smoothing 0.2": ("fit.label_smoothing=0.2",),
    "weights": ("fit.imbalance=weights",),
    "sampler": ("fit.imbalance=sampler",),
    "focal": ("fit.imbalance=focal",),
    "logit adjustment": ("fit.imbalance=logit-adjust",),
    "rate 1e-4": ("fit.optimizer.learning_rate=1e-4",),
    "rate 6e-4": ("fit.optimizer.learning_rate=6e-4",),
    "rate 1e-3": ("fit.optimizer.learning_rate=1e-3",),
    "decay 0.05": ("fit.optimizer.weight_decay=0.05",),
    "SGD 0.02": ("fit.optimizer.name=sgd", "fit.optimizer.learning_rate=0.02"),
    "LAMB 2e-3": ("fit.optimizer.name=lamb", "fit.optimizer.learning_rate=2e-3"),
    "one-cycle": ("fit.schedule.name=one-cycle",),
    "plateau": ("fit.schedule.name=plateau", "fit.schedule.wait=1"),
    "step": ("fit.schedule.name=step", "fit.schedule.every=1", "fit.schedule.factor=0.3"),
    "no warm-up": ("fit.warmup=0",),
    "layer decay 0.8": ("fit.layer_decay=0.8",),
    "backbone rate 0.3": ("fit.backbone_rate=0.3",),
    "batch 16": ("fit.batch_size=16",),
    "batch 64": ("fit.batch_size=64",),
    "no EMA": ("fit.ema=null",),
    "EMA 0.999": ("fit.ema=0.999",),
    "no clipping": ("fit.clip_norm=null",),
    "last 5 blocks": ("fit.unfreeze=5",),
    "all blocks": ("fit.unfreeze=all",),
    "gradual 1": ("fit.gradual=1",),
    "batch norm learns": ("fit.freeze_norm=false",),
    "dropout 0.2": ("model.dropout=0.2",),
    "dropout 0.5": ("model.dropout=0.5",),
    "stochastic depth 0.1": ("model.drop_path=0.1",),
    "L2 1e-4": ("fit.l2=1e-4",),
    "attention eca": ("model.attention=eca",),
    "attention se": ("model.attention=se",),
    "attention cbam": ("model.attention=cbam",),
    "fp32": ("fit.precision=fp32",),
    "images 0.75": ("fit.scale=0.75",),
    "distillation": ("distill.teacher={teacher}",),
    "growing images": ("fit.scale_start=0.6",),
    "6e-4, growing": ("fit.optimizer.learning_rate=6e-4", "fit.scale_start=0.6"),
    "6e-4, growing, logit": (
        "fit.optimizer.learning_rate=6e-4", "fit.scale_start=0.6", "fit.imbalance=logit-adjust",
    ),
}  # fmt: skip


def main() -> None:
    arguments = read_arguments()
    if arguments.data is None:
        report(read(arguments.report))
        return
    known = [name for name in VARIANTS if name != "distillation" or arguments.teacher is not None]
    names = arguments.only or known
    if not set(names) <= set(known):
        sys.exit("distillation needs --teacher")
    with tempfile.TemporaryDirectory() as folder:
        data = regroup(arguments.data, arguments.proxy or Path(folder) / "proxy.csv")
        for seed in arguments.seeds:
            for name in names:
                if any((run["name"], run["seed"]) == (name, seed) for run in read(arguments.out)):
                    continue
                own = [setting.format(teacher=arguments.teacher) for setting in VARIANTS[name]]
                settings = (*BASE, *arguments.set, *own, f"fit.seed={seed}")
                run = {"name": name, "seed": seed, **train(data, settings)}
                with arguments.out.open("a") as stream:
                    stream.write(json.dumps(run) + "\n")
                print(f"{name:22} {seed} {run['accuracy']:.1%} in {run['seconds']:.0f} s", flush=True)
    report(read(arguments.out))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("ablation.jsonl"), help="where runs are kept")
    parser.add_argument("--report", type=Path, default=Path("ablation.jsonl"), help="without CLOTHING")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--proxy", type=Path, help="keep the list of images here")
    parser.add_argument("--teacher", type=Path, help="run that distillation learns from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    return parser.parse_args()


def regroup(data: Path, file: Path) -> Path:
    """The same images as a CSV without test/, and with a fifth of train/ in validation."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_path", "label", "split"))
        for split in ("train", "validation"):
            for image in sorted((data / split).glob("*/*")):
                token = hashlib.sha256(image.name.encode()).digest()[0]
                judged = split == "validation" or token < 256 / 5
                writer.writerow((image.resolve(), image.parent.name, "validation" if judged else "train"))
    return file


def train(data: Path, settings: Sequence[str]) -> dict[str, Any]:
    """One run, in this process."""
    overrides: Mapping[str, Any] = {}
    for setting in settings:
        overrides = merge(overrides, parse_assignments([setting]))
    session: Session = open_session(data, resolve_config(TrainConfig, overrides=overrides))
    begun = time.perf_counter()
    log = RunLog(None)
    learned = learn(session, log=log)
    seconds = time.perf_counter() - begun
    labels = session.dataset.labels(session.dataset.rows("validation"))
    last = log.metrics[-1]
    return {
        "accuracy": learned.scores.accuracy,
        "balanced_accuracy": learned.scores.balanced_accuracy,
        "loss": learned.scores.log_loss,
        "last_accuracy": last["validation_accuracy"],
        "last_loss": last["validation_loss"],
        "train_loss": last["train_loss"],
        "seconds": seconds,
        "right": (learned.best.logits.argmax(axis=1) == labels).astype(int).tolist(),
    }


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def report(runs: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(run["name"] for run in runs))
    if "base" not in names:
        sys.exit("there is no run of base to compare with")
    base = {run["seed"]: run for run in runs if run["name"] == "base"}
    print(
        f"\n{'':22} {'seeds':>5} {'accuracy':>8} {'difference to base':>27} {'balanced':>8}"
        f" {'log loss':>8} {'seconds':>7}"
    )
    for name in names:
        own = [run for run in runs if run["name"] == name and run["seed"] in base]
        gaps = [np.array(run["right"]) - np.array(base[run["seed"]]["right"]) for run in own]
        told = str(mean_difference(np.mean(gaps, axis=0))) if name != "base" else ""
        mean = {
            key: float(np.mean([run[key] for run in own]))
            for key in ("accuracy", "balanced_accuracy", "loss", "seconds")
        }
        print(
            f"{name:22} {len(own):5} {mean['accuracy']:8.1%} {told:>27} {mean['balanced_accuracy']:8.1%}"
            f" {mean['loss']:8.3f} {mean['seconds']:7.0f}"
        )


if __name__ == "__main__":
    main()
