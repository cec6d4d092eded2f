"""What compression keeps and gains: size, labels and accuracy on all photos, speed against every runtime.

    python benchmarks/compression.py CLOTHING --runs runs --backbones tf_efficientnet_lite0 resnet18
    python benchmarks/compression.py CLOTHING --runs runs --methods int8 qat --out compression.jsonl

CLOTHING is a class folder with train/, validation/ and test/. A backbone is trained once, as
`runs/BACKBONE`, with packaged weights where there are some, else (--teacher) from the answers of another
run; then `compress` makes the candidates. Each row is judged in the way to run it that it names: accuracy
on validation and test together with paired bootstrap intervals, agreement with fp32 onnxruntime on every
photo of all three splits. All are timed in one interleaved run, each in a process of its own: torch eager,
onnxruntime fp32, OpenVINO fp32 and bf16, and each candidate in every runtime.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holotype import train
from holotype.bundle import Bundle, open_bundle
from holotype.compress import compress
from holotype.config import CompressConfig, DatasetConfig, merge, parse_assignments, resolve_config
from holotype.dataset import Dataset, open_dataset
from holotype.machine import machine_name
from holotype.runtime import open_runtime, served_bytes
from holotype.timing import Setup, race, setups_of, usable
from rivals.outcome import mean_difference

PACKAGED = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")


def main() -> None:
    arguments = read_arguments()
    for backbone in arguments.backbones:
        run = arguments.runs / backbone
        if not (run / "best").exists():
            train_backbone(backbone, arguments)
        found = run / "compressed"
        if not (found / "compress.json").exists():
            settings: Mapping[str, Any] = {
                "methods": arguments.methods, "search": "all", "budget": {"drop": 1.0}
            }  # fmt: skip
            settings = merge(settings, parse_assignments(arguments.set))
            compress(run, arguments.data, config=resolve_config(CompressConfig, overrides=settings))
        candidates = [open_bundle(folder) for folder in sorted((found / "candidates").glob("*/"))
                      if (folder / "holotype.json").exists()]  # fmt: skip
        rows = measure(open_bundle(run), candidates, arguments.data)
        report(backbone, rows)
        if arguments.out:
            with arguments.out.open("a") as stream:
                stream.write(
                    json.dumps({"backbone": backbone, "machine": machine_name(), "rows": rows}) + "\n"
                )


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--backbones", nargs="+", default=["tf_efficientnet_lite0"])
    parser.add_argument("--methods", nargs="+", default=["bf16", "int8", "qat"])
    parser.add_argument("--teacher", type=Path, help="run that backbones without packaged weights learn from")
    parser.add_argument("--size", type=int, default=128, help="side of the images of those backbones")
    parser.add_argument("--epochs", type=int, default=30, help="of those backbones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of compress")
    parser.add_argument("--out", type=Path, help="where results are appended, one JSON a line")
    return parser.parse_args()


def train_backbone(backbone: str, arguments: argparse.Namespace) -> None:
    overrides: dict[str, Any] = {"model": {"name": backbone}}
    if backbone not in PACKAGED:
        overrides["model"]["weights"] = "none"
        overrides["data"] = {"size": arguments.size}
        overrides["fit"] = {"epochs": arguments.epochs, "patience": arguments.epochs}
        if arguments.teacher is not None:
            overrides["distill"] = {"teacher": str(arguments.teacher), "weight": 0.7}
    train(arguments.data, name=backbone, overrides=overrides, runs=arguments.runs)


def measure(parent: Bundle, candidates: Sequence[Bundle], data: Path) -> list[dict[str, Any]]:
    """A row for each bundle in each way to run it, all compared with the parent in fp32 onnxruntime."""
    spec = parent.manifest.preprocess
    dataset = open_dataset(data, spec=spec, config=DatasetConfig())
    setups = [Setup(parent.path, "torch", "fp32"), Setup(parent.path, "torch", "bf16"), *setups_of(parent),
              Setup(parent.path, "openvino", "bf16")]  # fmt: skip
    setups = usable(setups + [setup for bundle in candidates for setup in setups_of(bundle)])
    timings = race(setups, batches=(1, 8))
    bundles = {bundle.path: bundle for bundle in (parent, *candidates)}
    truth, judged = true_labels(dataset, parent.manifest.classes)
    base = label_all(Setup(parent.path, "onnxruntime", "fp32"), bundles, dataset)
    rows = []
    for timing in timings:
        bundle, said = bundles[timing.setup.bundle], label_all(timing.setup, bundles, dataset)
        right, before = said[judged] == truth[judged], base[judged] == truth[judged]
        difference = mean_difference(right.astype(float) - before.astype(float))
        rows.append(
            {
                "method": bundle.manifest.compression.get("method", "parent"),
                "runtime": timing.setup.runtime,
                "precision": timing.setup.precision,
                "bytes": served_bytes(bundle, timing.setup.runtime),
                "accuracy": float(right.mean()),
                "difference": str(difference),
                "agreement": float((said == base).mean()),
                "ms": timing.batches[1].p50,
                "images_per_second_1": timing.batches[1].images_per_second,
                "images_per_second_8": timing.batches[8].images_per_second,
                "peak_mb": timing.peak_mb,
            }
        )
    return rows


def label_all(setup: Setup, bundles: Mapping[Path, Bundle], dataset: Dataset) -> np.ndarray:
    """The label of every photo of every split, as this way to run a bundle gives it."""
    runtime = open_runtime(bundles[setup.bundle], name=setup.runtime, precision=setup.precision)
    rows = all_rows(dataset)
    batches = [rows[at : at + 16] for at in range(0, len(rows), 16)]
    return np.concatenate([runtime.run(images).logits.argmax(axis=1) for images in dataset.pixels(batches)])


def all_rows(dataset: Dataset) -> np.ndarray:
    return np.concatenate([dataset.rows(split) for split in ("train", "validation", "test")])


def true_labels(dataset: Dataset, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of all photos as places in `classes`, and which of them are of validation or test."""
    rows = all_rows(dataset)
    places = np.array([classes.index(name) for name in dataset.classes])
    judged = np.arange(len(rows)) >= len(dataset.rows("train"))
    return places[dataset.labels(rows)], judged


def report(backbone: str, rows: Sequence[dict[str, Any]]) -> None:
    fp32 = next(row for row in rows if (row["method"], row["runtime"]) == ("parent", "onnxruntime"))
    eager = next(row for row in rows if (row["runtime"], row["precision"]) == ("torch", "fp32"))
    floats = [row for row in rows if row["method"] in ("parent", "openvino", "bf16")]
    print(f"\n{backbone}, on {machine_name()}")
    print(
        f"{'':26} {'size':>7} {'of fp32':>7} {'accuracy':>8} {'difference':>28} {'labels':>7} {'ms':>6}"
        f" {'x fp32 1/8':>11} {'x eager 1/8':>12} {'x best float 1/8':>17}"
    )
    for row in rows:
        ratios = []
        for other in ([fp32], [eager], floats):
            pair = []
            for size in (1, 8):
                key = f"images_per_second_{size}"
                pair.append(f"{row[key] / max(one[key] for one in other):.2f}")
            ratios.append(" / ".join(pair))
        print(
            f"{row['method']:14} {row['runtime'][:11]:11} {row['precision']:4}"
            f" {row['bytes'] / 1e6:7.2f} {row['bytes'] / fp32['bytes']:7.1%} {row['accuracy']:8.1%}"
            f" {row['difference']:>28} {row['agreement']:7.2%} {row['ms']:6.2f}"
            f" {ratios[0]:>11} {ratios[1]:>12} {ratios[2]:>17}"
        )


if __name__ == "__main__":
    main()
