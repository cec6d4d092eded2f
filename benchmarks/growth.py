"""What an epoch costs from 1,000 to 12,000 images, and the peak memory beside the plain loop's.

    python benchmarks/growth.py CIFAR10 [--size 128] [--counts 1000 2000 4000 8000 12000]

CIFAR10 holds class folders, in splits or not; the first images of every class are linked into folders of
each size, 8 of 10 as train, one each as validation and test. Each is a whole `holotype train` of three
epochs of the default backbone, all of it, with a cold cache in a process of its own. The cost of an epoch is
that of the cheaper of the last two. Prints the straight lines through the costs of an epoch and of the whole
command with their R², what an image costs at both ends, and the peak memory of the process tree (shared
pages once; "firm": without mapped files, such as the pixel cache, whose pages the system can take back), with
that of the plain loop (rivals/plain_loop.py) on the largest.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holotype.config import SourceConfig
from holotype.dataset.source import read_source
from rivals.outcome import Outcome
from rivals.race import Rival, fine_tuning, race_rival, train_ours, write_weights


@dataclass(frozen=True)
class Cost:
    """Seconds of an epoch and of the whole command, and its peaks of memory, for so many images."""

    images: int
    epoch: float
    seconds: float
    peak_mb: float
    firm_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side of the images")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 12_000])
    arguments = parser.parse_args()
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.counts:
            data = Path(folder) / str(count)
            link(arguments.data, data, count=count)
            costs.append(measure(data, count=count, size=arguments.size))
            print(
                f"{count:6} images: epoch {costs[-1].epoch:6.1f} s, all {costs[-1].seconds:6.1f} s, peak"
                f" {costs[-1].peak_mb:6.0f} MB, firm {costs[-1].firm_mb:6.0f} MB",
                flush=True,
            )
        weights = Path(folder) / "imagenet.pth"
        write_weights(weights)
        options = ("--weights", str(weights), "--size", str(arguments.size))
        rival = Rival("plain", "plain_loop", options=options)
        plain = race_rival(rival, data, seed=0, minutes=0, plan=(1, ()))
    report(costs, plain=plain)


def link(source: Path, target: Path, *, count: int) -> None:
    """Hard links (else copies) of `count` images, equally many of each class, split 8 : 1 : 1."""
    by_class: dict[str, list[Path]] = {}
    for record in read_source(source, config=SourceConfig()).records:
        by_class.setdefault(record.label, []).append(source / record.path)
    each = count // len(by_class)
    for label, files in by_class.items():
        if len(files) < each:
            sys.exit(f"{label} has {len(files)} images, {each} are needed")
        for place, file in enumerate(files[:each]):
            split = {8: "validation", 9: "test"}.get(place % 10, "train")
            link = target / split / label / f"{place}{file.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.hardlink_to(file)
            except OSError:
                shutil.copy2(file, link)


def measure(data: Path, *, count: int, size: int) -> Cost:
    settings = (f"data.size={size}", "fit.scale=1", "fit.unfreeze=all", "fit.epochs=3")
    with train_ours(data, seed=0, settings=settings) as run:
        epochs = [float(row["seconds"]) for row in fine_tuning(run)]
        return Cost(count, min(epochs[1:]), run.watched.seconds, run.watched.peak_mb, run.watched.firm_mb)


def report(costs: list[Cost], *, plain: Outcome) -> None:
    images = np.array([cost.images for cost in costs], dtype=float)
    for name, seconds in (
        ("an epoch", [cost.epoch for cost in costs]),
        ("the whole command", [cost.seconds for cost in costs]),
    ):
        slope, base = np.polyfit(images, seconds, 1)
        determined = np.corrcoef(images, seconds)[0, 1] ** 2
        print(f"{name}: {base:.1f} s + {1e3 * slope:.2f} ms for each image, R² {determined:.4f}")
    first, last = costs[0], costs[-1]
    print(
        f"an epoch per image: {1e3 * first.epoch / first.images:.2f} ms of {first.images},"
        f" {1e3 * last.epoch / last.images:.2f} ms of {last.images}"
    )
    for name, of_first, of_last, of_plain in (
        ("peak", first.peak_mb, last.peak_mb, plain.peak_mb),
        ("firm", first.firm_mb, last.firm_mb, plain.firm_mb),
    ):
        print(
            f"{name} memory: {of_first:.0f} MB of {first.images}, {of_last:.0f} MB of {last.images};"
            f" the plain loop {of_plain:.0f} MB, ratio {of_last / of_plain:.2f}"
        )


if __name__ == "__main__":
    main()
