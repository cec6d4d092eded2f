"""Proof that the graph which was trained is the file which is deployed: both answer the same real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import torch

from holotype.compress.trainable import TrainableGraph
from holotype.dataset import Dataset
from holotype.errors import ModelError
from holotype.machine import available_cores
from holotype.policy import Policy, probabilities
from holotype.preprocess import Pixels
from holotype.runtime import load_onnx_model

__all__ = ["LEAST_AGREEMENT", "Proof", "prove"]

LEAST_AGREEMENT = 0.995
"""Share of labels that must be equal; one image may differ even where it is a larger share."""

Logits = npt.NDArray[np.float32]

_IMAGES = 2000
_BATCH = 16


@dataclass(frozen=True)
class Proof:
    """On so many images: the share of equal labels, and the largest difference of any probability."""

    images: int
    agreement: float
    shift: float


def prove(graph: TrainableGraph, model: onnx.ModelProto, dataset: Dataset) -> Proof:
    """Compare `graph` in torch with `model`, the file it was written to, in onnxruntime.

    On all images of validation, and so many of training that they are 2,000: sums in another order fall on
    another side of what is rounded, so that two correct ways to run one file are 0.005 apart in total
    variation, and of a few hundred images chance alone turns more than the limit allows. `ModelError` where
    less than `LEAST_AGREEMENT` of the labels are equal: on a CPU whose 8-bit sums saturate, or because the
    network answers otherwise whichever way its sums are rounded, which the error then says.
    """
    device = next(graph.parameters()).device

    def in_torch(images: Pixels) -> Logits:
        with torch.no_grad():
            logits: Logits = graph(torch.from_numpy(images).to(device))[0].cpu().numpy()
        return logits

    trained, written = _said(in_torch, dataset), _said(_in_file(model), dataset)
    equal = trained.argmax(axis=1) == written.argmax(axis=1)
    proof = Proof(len(equal), float(equal.mean()), float(np.abs(trained - written).max()))
    # Also true of answers that are no numbers.
    if not proof.shift <= 1 or (~equal).sum() > max(1, (1 - LEAST_AGREEMENT) * len(equal)):
        again = _said(_in_file(model, as_written=True), dataset)
        itself = float((written.argmax(axis=1) == again.argmax(axis=1)).mean())
        raise ModelError(
            f"the file gives other labels than the graph that was trained: {proof.agreement:.2%} of"
            f" {proof.images} are equal (limit {LEAST_AGREEMENT:.1%}), probabilities differ by"
            f" {proof.shift:.2g} at most; with itself, computed in another order, it agrees on {itself:.2%}",
            fix="train the network further, or leave qat out of methods",
        )
    return proof


def _in_file(model: onnx.ModelProto, *, as_written: bool = False) -> Callable[[Pixels], Logits]:
    runtime = load_onnx_model(model, threads=available_cores(), as_written=as_written)
    return lambda images: runtime.run(images).logits


def _said(answer: Callable[[Pixels], Logits], dataset: Dataset) -> npt.NDArray[np.float64]:
    """The probabilities of every image of the proof."""
    logits = np.concatenate([answer(images) for images in _images(dataset)])
    return probabilities(logits, policy=Policy())


def _images(dataset: Dataset) -> Iterator[Pixels]:
    rows = _rows(dataset)
    return dataset.pixels([rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)])


def _rows(dataset: Dataset) -> npt.NDArray[np.int64]:
    rows, more = dataset.rows("validation"), dataset.rows("train")
    lacking = min(max(_IMAGES - len(rows), 0), len(more))
    places = np.linspace(0, len(more) - 1, lacking).round().astype(np.int64)
    return np.concatenate([rows, more[places]])
