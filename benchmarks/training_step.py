"""What a training step costs on a CPU, with torch's own convolutions and with `fit/convolution.py`.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py [architecture ...]

Milliseconds of CPU time per image (forward, backward, AdamW; the last 60 % of the blocks trained, batch-norm
statistics frozen), the best of a few interleaved rounds; and how far the gradient of all weights is from that
of the same network in fp64, as a share of its length. Neighbours on the machine matter little to one thread.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.fit.convolution import faster_convolutions
from holotype.fit.freeze import apply_freezing, training_mode
from holotype.fit.memory import keep_freed_memory
from holotype.fit.optimizer import build_optimizer
from holotype.fit.rehearsal import example, forward
from holotype.models import Architecture, Classifier, pretrained, recipe_of

CPU = torch.device("cpu")
CLASSES = 20
CASES = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "fp32, faster": ("fp32", True),
    "bf16, faster": ("bf16", True),
}


def network(name: str, size: int, config: FitConfig, *, weights: str) -> Classifier:
    recipe = recipe_of(name)
    classifier, _ = pretrained(
        Architecture(name=name, classes=CLASSES, height=size, width=size, mean=recipe.mean, std=recipe.std),
        weights=weights,
    )
    apply_freezing(classifier, config, epoch=1)
    training_mode(classifier, freeze_norm=True)
    return classifier.to(memory_format=torch.channels_last)


def backward(classifier: Classifier, images: torch.Tensor, *, precision: str) -> None:
    logits = forward(classifier, images, precision=precision)
    functional.cross_entropy(logits, torch.arange(len(images)) % CLASSES).backward()


def gradient(classifier: Classifier) -> torch.Tensor:
    found = [p.grad.double().flatten() for p in classifier.parameters() if p.grad is not None]
    classifier.zero_grad()
    return torch.cat(found)


def case(classifier: Classifier, *, faster: bool) -> AbstractContextManager[Any]:
    return faster_convolutions(classifier) if faster else nullcontext()


def measure(name: str, arguments: argparse.Namespace) -> None:
    config = FitConfig(unfreeze="most", freeze_norm=True)
    images = example(arguments.batch, size=Shape(arguments.size, arguments.size), device=CPU)
    classifier = network(name, arguments.size, config, weights=arguments.weights)
    optimizer = build_optimizer(classifier, config)
    few = images[:8]
    exact_network = copy.deepcopy(classifier).double()
    logits, _ = exact_network(few)
    functional.cross_entropy(logits, torch.arange(len(few)) % CLASSES).backward()
    exact = gradient(exact_network)
    best = dict.fromkeys(CASES, float("inf"))
    off = {}
    for label, (precision, faster) in CASES.items():
        with case(classifier, faster=faster):
            backward(classifier, few, precision=precision)
        off[label] = float((gradient(classifier) - exact).norm() / exact.norm())
    for turn in range(arguments.rounds + 1):
        for label, (precision, faster) in CASES.items():
            with case(classifier, faster=faster):
                start = time.process_time()
                backward(classifier, images, precision=precision)
                optimizer.step()
                optimizer.zero_grad()
                seconds = time.process_time() - start
            if turn:  # the first builds kernels
                best[label] = min(best[label], seconds)
    print(f"{name}, {arguments.size} px, batch {arguments.batch}")
    for label, seconds in best.items():
        each, gain = 1e3 * seconds / arguments.batch, best["fp32"] / seconds
        print(f"  {label:13s} {each:6.1f} ms per image, {gain:.2f}x; gradient off by {off[label]:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["tf_efficientnet_lite0"])
    parser.add_argument("--size", type=int, default=176)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="auto")
    arguments = parser.parse_args()
    keep_freed_memory()
    for name in arguments.names:
        measure(name, arguments)


if __name__ == "__main__":
    main()
