"""Seconds to an accuracy: holotype against a plain PyTorch loop, same data, backbone and weights, in one run.

    python benchmarks/time_to_accuracy.py DATA --minutes 12

DATA is a class folder with train/, validation/ and test/. The plain loop is the one of tutorials:
torchvision's ImageFolder, RandomResizedCrop and flip, a DataLoader with two workers, the whole network
fine-tuned with AdamW and a cosine schedule from the same ImageNet weights, validation after every epoch.
Both count from the class folder, imports and decoding included; holotype also exports, passes the parity
gate and writes its report in its time. The pixel cache is cold. Prints a table and, last, the ratio.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """Validation accuracy reached after some seconds."""

    seconds: float
    accuracy: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=12.0, help="for the plain loop")
    parser.add_argument("--preset", default="balanced", help="of holotype")
    parser.add_argument("--plain-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_only:
        plain_loop(arguments.data, seconds=60 * arguments.minutes)
        return
    ours = run_holotype(arguments.data, preset=arguments.preset)
    plain = run_plain(arguments.data, minutes=arguments.minutes)
    report(ours, plain)


def run_holotype(data: Path, *, preset: str) -> list[Point]:
    """A whole `holotype train`, as a user types it; its epochs as points."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HOLOTYPE_CACHE": f"{folder}/cache"}
        command = [sys.executable, "-m", "holotype", "train", str(data), "--preset", preset, "--name", "run"]
        start = time.perf_counter()
        subprocess.run([*command, "--runs", folder], check=True, env=environment, stdout=subprocess.DEVNULL)
        total = time.perf_counter() - start
        return points_of(Path(folder) / "run", total=total)


def points_of(run: Path, *, total: float) -> list[Point]:
    import csv

    with (run / "metrics.csv").open() as stream:
        metrics = list(csv.DictReader(stream))
    with (run / "timings.csv").open() as stream:
        epochs = [row for row in csv.DictReader(stream) if row["stage"] in ("head", "fine-tune")]
    spent = [float(row["seconds"]) for row in epochs]
    # What is not an epoch (imports, decoding, features, export, report) is counted before the first of them.
    clock = total - sum(spent)
    points = []
    for row, seconds in zip(metrics, spent, strict=True):
        clock += seconds
        points.append(Point(clock, float(row["validation_accuracy"])))
    return points


def run_plain(data: Path, *, minutes: float) -> list[Point]:
    command = [sys.executable, __file__, str(data), "--minutes", str(minutes), "--plain-only"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [line.split() for line in process.stdout or () if line.startswith("epoch")]
    return [Point(float(line[1]), float(line[2])) for line in lines]


def plain_loop(data: Path, *, seconds: float) -> None:
    """Fine-tune in the manner of tutorials, printing `epoch SECONDS ACCURACY`."""
    start = time.perf_counter()
    import timm
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from holotype.models import Architecture, pretrained, recipe_of

    torch.manual_seed(0)
    name = "tf_efficientnet_lite0"
    recipe = recipe_of(name)
    normal = transforms.Normalize(recipe.mean, recipe.std)
    training = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normal,
    ])  # fmt: skip
    plain = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normal,
    ])  # fmt: skip
    train = datasets.ImageFolder(str(data / "train"), training)
    validation = datasets.ImageFolder(str(data / "validation"), plain)
    loader = DataLoader(train, batch_size=32, shuffle=True, num_workers=2, persistent_workers=True)
    judge = DataLoader(validation, batch_size=32, num_workers=2)
    architecture = Architecture(
        name=name, classes=len(train.classes), height=224, width=224, mean=recipe.mean, std=recipe.std
    )
    model: nn.Module = timm.create_model(name, num_classes=len(train.classes))
    # The same weights; only the loading is ours.
    model.load_state_dict(pretrained(architecture)[0].network.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    epochs = 20
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
            if time.perf_counter() - start > seconds:
                return
        model.eval()
        right = 0
        with torch.inference_mode():
            for images, labels in judge:
                right += int((model(images).argmax(1) == labels).sum())
        print(f"epoch {time.perf_counter() - start:.1f} {right / len(validation):.4f}", flush=True)


def report(ours: list[Point], plain: list[Point]) -> None:
    print(f"{'':12} {'seconds':>8} {'validation':>11}")
    for name, points in (("holotype", ours), ("plain loop", plain)):
        for point in points:
            print(f"{name:12} {point.seconds:8.0f} {point.accuracy:11.1%}")
    if not plain:
        print("the plain loop finished no epoch in its time")
        return
    best = max(point.accuracy for point in plain)
    theirs = next(point.seconds for point in plain if point.accuracy == best)
    reached = next((point.seconds for point in ours if point.accuracy >= best), None)
    if reached is None:
        print(f"holotype did not reach the plain loop's best, {best:.1%}")
    else:
        print(f"to {best:.1%}: holotype {reached:.0f} s, plain {theirs:.0f} s, ratio {theirs / reached:.1f}")


if __name__ == "__main__":
    main()
