"""Whether the graph that was trained rounded is the graph that is deployed, on every photo.

    python benchmarks/rounding.py QAT_BUNDLE CLOTHING

The file of the bundle is read as the torch module that quantization-aware training trains, and run in
onnxruntime and OpenVINO; all three label all photos of train, validation and test. Prints how many labels are
equal to the module's, and the largest and the mean distance of probabilities.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch

from holotype.bundle import open_bundle
from holotype.compress.trainable import TrainableGraph
from holotype.config import DatasetConfig
from holotype.dataset import open_dataset
from holotype.machine import machine_name
from holotype.policy import probabilities, total_variation
from holotype.progress import track
from holotype.runtime import open_runtime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    spec, policy = bundle.manifest.preprocess, bundle.manifest.policy
    dataset = open_dataset(arguments.data, spec=spec, config=DatasetConfig())
    rows = np.concatenate([dataset.rows(split) for split in ("train", "validation", "test")])
    batches = [rows[at : at + 16] for at in range(0, len(rows), 16)]
    model = onnx.load(bundle.path / bundle.manifest.payloads["onnx"].path)
    graph = TrainableGraph(model, original=model).eval()
    runtimes = {
        name: open_runtime(bundle, name=name, precision="fp32") for name in ("onnxruntime", "openvino")
    }
    trained, deployed = [], {name: [] for name in runtimes}
    with torch.inference_mode(), track("labelling", total=len(rows)) as progress:
        for images in dataset.pixels(batches):
            trained.append(graph(torch.from_numpy(images.copy()))[0].numpy())
            for name, runtime in runtimes.items():
                deployed[name].append(runtime.run(images).logits)
            progress.advance(len(images))
    expected = np.concatenate(trained)
    print(f"on {machine_name()}: {len(rows)} photos, {bundle.manifest.compression.get('method')}")
    for name, parts in deployed.items():
        said = np.concatenate(parts)
        equal = said.argmax(axis=1) == expected.argmax(axis=1)
        given, wanted = (probabilities(logits, policy=policy) for logits in (said, expected))
        print(
            f"{name:12} labels equal on {equal.sum()} ({equal.mean():.2%}); probabilities at most"
            f" {np.abs(given - wanted).max():.3f} apart, total variation"
            f" {total_variation(given, wanted):.4f} on average"
        )


if __name__ == "__main__":
    main()
