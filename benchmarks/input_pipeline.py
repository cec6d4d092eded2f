"""What augmentation costs beside a training step, and how fast images arrive beside torchvision's pipeline.

    python benchmarks/input_pipeline.py DATA [--rounds 7] [--images 640] [--workers 2] [--json]

DATA is a folder with `train/CLASS/FILE`. Three comparisons, each interleaved in one run, as medians:

- step: preset `standard` on a batch of 32 from its view with a margin, against forward, backward and
  optimizer step of the default backbone, its last 10 of 17 blocks, at the default training size, in the
  precision that `train` would choose;
- pipeline: images per second of our pixel cache (warm, as from the second epoch on) and augmentation at 224
  pixels against ImageFolder, transforms v2 on bytes with the same augmentations, and a DataLoader. Its
  workers are started, and its first batch is there, before its clock starts; both end in `uint8` batches;
- jitter: the fused jitter of hue, saturation and value against RGB → HSV → RGB by kornia, on the same images.

The pixel cache goes where HOLOTYPE_CACHE says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2

from holotype.augment import Samples, augment, draw
from holotype.augment.colour import jitter_colours
from holotype.augment.draws import Jitter
from holotype.config import AugmentConfig, DatasetConfig, FitConfig
from holotype.dataset import Dataset, Shape, margin_shape, open_dataset
from holotype.fit.optimizer import build_optimizer
from holotype.fit.precision import choose_precision
from holotype.fit.rehearsal import example, rehearsal, step
from holotype.fit.session import keep_freed_memory
from holotype.models import DEFAULT, Architecture, pretrained, recipe_of
from holotype.preprocess import Preprocess

BATCH = 32
CPU = torch.device("cpu")
STANDARD = AugmentConfig(preset="standard")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleaved(*works: Callable[[], float], rounds: int) -> list[list[float]]:
    """What each measures in every round after a first one for warming up; who begins changes."""
    found: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + 1):
        order = range(len(works)) if turn % 2 else reversed(range(len(works)))
        for place in order:
            value = works[place]()
            if turn:
                found[place].append(value)
    return found


def samples_of(rows: np.ndarray) -> Samples:
    return Samples(rows, np.zeros_like(rows))


def against_step(*, rounds: int) -> dict[str, object]:
    recipe = recipe_of(DEFAULT)
    side = 16 * round(0.8 * recipe.height / 16)
    size, config = Shape(side, side), FitConfig(unfreeze=10)
    architecture = Architecture(
        name=DEFAULT, classes=10, height=recipe.height, width=recipe.width, mean=recipe.mean, std=recipe.std
    )
    classifier, _ = pretrained(architecture, weights="auto")
    precision = choose_precision(classifier, config, size=size, device=CPU)
    view = margin_shape(size, crop=STANDARD.crop)
    images, fed = example(BATCH, size=view, device=CPU), example(BATCH, size=size, device=CPU)
    epochs = iter(range(1, 1_000_000))

    def augmentation() -> None:
        draws = draw(STANDARD, seed=0, epoch=next(epochs), samples=samples_of(np.arange(BATCH)))
        augment(images, draws, height=size.height, width=size.width)

    with rehearsal(classifier, config, device=CPU) as model:
        optimizer = build_optimizer(model, config)

        def training() -> None:
            step(model, fed, precision=precision)
            optimizer.step()
            optimizer.zero_grad()

        ours, whole = interleaved(lambda: seconds(augmentation), lambda: seconds(training), rounds=rounds)
    return {
        "precision": precision,
        "augmentation_ms": 1000 * statistics.median(ours),
        "step_ms": 1000 * statistics.median(whole),
        "share": statistics.median(mine / all_ for mine, all_ in zip(ours, whole, strict=True)),
    }


def dataset_of(folder: Path, *, view: Shape) -> Dataset:
    return open_dataset(folder, spec=Preprocess(), config=DatasetConfig(), shapes=(view,))


def rival_loader(folder: Path, *, count: int, workers: int) -> DataLoader[torch.Tensor]:
    """The same augmentations in the order that is cheapest for it: cropped to size first."""
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(224, scale=(STANDARD.crop, 1), antialias=True),
            v2.RandomAffine(STANDARD.rotation, interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomHorizontalFlip(STANDARD.flip),
            v2.ColorJitter(brightness=STANDARD.value, saturation=STANDARD.saturation, hue=STANDARD.hue / 360),
            v2.GaussianNoise(sigma=0.03),
        ]
    )
    images = datasets.ImageFolder(str(folder / "train"), transforms)
    chosen = Subset(images, np.random.default_rng(0).permutation(len(images))[:count].tolist())
    return DataLoader(chosen, batch_size=BATCH, num_workers=workers)


def against_torchvision(folder: Path, *, rounds: int, count: int, workers: int) -> dict[str, object]:
    size = Shape(224, 224)
    view = margin_shape(size, crop=STANDARD.crop)
    dataset = dataset_of(folder, view=view)
    order = np.random.default_rng(0).permutation(dataset.rows("train"))[:count]
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    loader = rival_loader(folder, count=count, workers=workers)
    epochs = iter(range(1, 1_000_000))

    def ours() -> float:
        epoch = next(epochs)

        def work() -> None:
            for rows, images in zip(batches, dataset.pixels(batches, shape=view), strict=True):
                draws = draw(STANDARD, seed=0, epoch=epoch, samples=samples_of(rows))
                augment(torch.from_numpy(images), draws, height=size.height, width=size.width)

        return len(order) / seconds(work)

    def theirs() -> float:
        arriving = iter(loader)
        first = len(next(arriving)[0])
        return (count - first) / seconds(lambda: [images for images, _ in arriving])

    mine, rival = interleaved(ours, theirs, rounds=rounds)
    return {
        "images": len(order),
        "workers": workers,
        "ours_per_second": statistics.median(mine),
        "torchvision_per_second": statistics.median(rival),
        "speedup": statistics.median(fast / slow for fast, slow in zip(mine, rival, strict=True)),
    }


def against_conversion(*, rounds: int) -> dict[str, object]:
    from kornia.color import hsv_to_rgb, rgb_to_hsv

    images = example(4, size=Shape(224, 224), device=CPU).permute(0, 3, 1, 2).float().contiguous()
    hue, saturation, value = np.full(4, 7.0), np.full(4, 1.1), np.full(4, 0.9)

    def fused() -> None:
        jitter_colours(images, Jitter(hue, saturation, value))

    def converted() -> None:
        turned, strong, bright = rgb_to_hsv(images / 255).unbind(1)
        turned = (turned + np.radians(7.0)) % (2 * np.pi)
        strong, bright = (strong * 1.1).clamp(max=1), (bright * 0.9).clamp(max=1)
        hsv_to_rgb(torch.stack([turned, strong, bright], 1)).mul(255)

    fast, slow = interleaved(lambda: seconds(fused), lambda: seconds(converted), rounds=4 * rounds)
    return {
        "fused_ms_per_image": 250 * statistics.median(fast),
        "converted_ms_per_image": 250 * statistics.median(slow),
        "speedup": statistics.median(long / short for short, long in zip(fast, slow, strict=True)),
    }


def table(results: dict[str, dict[str, object]]) -> Sequence[str]:
    lines = []
    for name, row in results.items():
        cells = (
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        )
        lines.append(f"{name:9} {'   '.join(cells)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a folder with train/CLASS/FILE")
    parser.add_argument("--rounds", type=int, default=7, help="times each side is measured")
    parser.add_argument("--images", type=int, default=640, help="of the pipeline, in a round")
    parser.add_argument("--workers", type=int, default=2, help="of torchvision's DataLoader")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()

    keep_freed_memory()
    results = {
        "step": against_step(rounds=arguments.rounds),
        "pipeline": against_torchvision(
            arguments.data, rounds=arguments.rounds, count=arguments.images, workers=arguments.workers
        ),
        "jitter": against_conversion(rounds=arguments.rounds),
    }
    print(json.dumps(results, indent=1) if arguments.json else "\n".join(table(results)))


if __name__ == "__main__":
    main()
