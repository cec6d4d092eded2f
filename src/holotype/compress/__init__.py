"""`holotype compress`: one budget for accuracy, size and latency, searched from cheap to dear, with proof."""

from __future__ import annotations

import time
from pathlib import Path

from holotype.bundle import Bundle, home_of, open_bundle, write_bundle
from holotype.calibrate import rule_of
from holotype.compress.contract import Compressed, TestScore
from holotype.compress.decision import decide
from holotype.compress.folder import Folder, check_folder, open_folder
from holotype.compress.judge import Panel, answers, compare, open_panel
from holotype.compress.page import write_page
from holotype.compress.search import Found, check_methods, walk
from holotype.compress.workshop import Measured, Workshop
from holotype.config import CompressConfig
from holotype.dataset import (
    as_trained,
    check_splits,
    open_dataset,
    recorded_source,
    tell_splits,
    thumbnailer,
)
from holotype.errors import BundleError
from holotype.machine import available_cores, machine_name
from holotype.metrics import evaluate_predictions
from holotype.predictor import load
from holotype.runtime import Choice, load_onnx, remember, remembered
from holotype.scoring import score
from holotype.timing import find_fastest

__all__ = ["Compressed", "compress"]


def compress(
    target: Path | str,
    data: Path | str | None = None,
    *,
    out: Path | str | None = None,
    config: CompressConfig | None = None,
    device: str = "auto",
) -> Compressed:
    """Search for the fastest form of a bundle inside `config.budget`, and write it to `out`/best.

    `data` defaults to the dataset that the bundle was trained on, `out` to `compressed` in its run folder.
    Candidates are judged on validation; the test split is read once, for what was chosen. Also written:
    `candidates/`, compress.json, compress.html and pareto.png. Interrupted, the same call goes on after the
    last method that was done. `BundleError` where the bundle has no float ONNX model, `ConfigError` where a
    method that is named in `config` cannot work here.
    """
    begun = time.perf_counter()
    config = config or CompressConfig()
    source = open_bundle(target)
    _check(source)
    check_methods(source, config)
    path = Path(out) if out is not None else home_of(target) / "compressed"
    check_folder(path)  # before images are read
    images = Path(data) if data is not None else recorded_source(source)
    config = _as_trained(config, source, images)
    tell_splits(source, images, config.data)
    dataset = open_dataset(images, spec=source.manifest.preprocess, config=config.data)
    check_splits(dataset, "train", "validation")
    panel = open_panel(dataset, source.manifest.classes)
    folder = open_folder(path, source, panel.dataset, config)
    shop = _open_shop(source, panel, config=config, folder=folder, device=device)
    found = folder.read()
    walk(shop, found, keep=folder.keep)
    outcome = _finish(shop, found, folder, begun=begun)
    write_page(folder.path, outcome, thumbnail=thumbnailer(panel.dataset))
    folder.finish(outcome)
    return outcome


def _check(source: Bundle) -> None:
    if "onnx" not in source.manifest.payloads or source.manifest.precision != "fp32":
        raise BundleError(
            "has no float ONNX model to compress", where=source.path, fix="give the bundle that train wrote"
        )


def _as_trained(config: CompressConfig, source: Bundle, images: Path) -> CompressConfig:
    """Where it is silent, data is split and "not sure" is said as when `source` was trained."""
    return config.model_copy(
        update={
            "data": as_trained(source, images, config=config.data),
            "policy": rule_of(source, config.policy),
        }
    )


def _open_shop(
    source: Bundle, panel: Panel, *, config: CompressConfig, folder: Folder, device: str
) -> Workshop:
    model = source.path / source.manifest.payloads["onnx"].path
    before = answers(load_onnx(model, threads=available_cores()), panel)
    return Workshop(source, panel, before, config, folder.candidates, device)


def _finish(shop: Workshop, found: Found, folder: Folder, *, begun: float) -> Compressed:
    """Decide, write what was chosen, remember how it runs fastest, and read the test split once."""
    decision = decide(found, shop.config.budget)
    chosen, test = decision.chosen, None
    said = shop.before if chosen is None else chosen.logits
    verdict = compare(shop.before, said, shop.panel)
    if chosen is not None:
        best = write_bundle(
            folder.path / "best",
            chosen.bundle.manifest,
            files={
                name: chosen.bundle.path / payload.path
                for name, payload in chosen.bundle.manifest.payloads.items()
            },
        )
        _remember(chosen, best)
        test = _test(shop, chosen, best)
    return Compressed(
        decision=decision.kind,
        reason=decision.reason,
        budget=decision.budget,
        parent=found.parent,
        best_float=decision.best_float,
        chosen=None
        if chosen is None
        else chosen.candidate.model_copy(update={"bundle": str(folder.path / "best")}),
        candidates=decision.candidates,
        not_tried=found.not_tried,
        classes=verdict.classes,
        flips=verdict.flips,
        sensitivity=shop.sensitivities,
        sensitivity_images=len(shop.sensitivity_rows) if shop.sensitivities else 0,
        test=test,
        machine=machine_name(),
        seconds=time.perf_counter() - begun,
    )


def _remember(chosen: Measured, best: Bundle) -> None:
    """Keep which way of those that were measured runs it fastest; the parent was timed in one way alone."""
    if chosen.made.method != "parent":
        remember(best, Choice(chosen.candidate.runtime, chosen.candidate.precision))
    elif remembered(best) is None:
        find_fastest(best)


def _test(shop: Workshop, chosen: Measured, best: Bundle) -> TestScore | None:
    """Accuracy of the chosen bundle on test, as users will load it; None where there is no test."""
    dataset = shop.panel_for(chosen.made).dataset
    if "test" not in dataset.splits:
        return None
    predictions = score(load(best.path), dataset, split="test")
    accuracy = evaluate_predictions(predictions)["accuracy"]
    return TestScore(
        accuracy=accuracy.value, low=accuracy.low, high=accuracy.high, images=len(predictions.labels)
    )
