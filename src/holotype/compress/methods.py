"""The methods, each of which makes candidates and knows what was measured before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from holotype.bundle import PayloadName, Precision, write_text
from holotype.compress.judge import Logits, Panel, answers, open_panel
from holotype.compress.magnitude import zero_small_weights, zeros_kept
from holotype.compress.qat import train_rounded
from holotype.compress.recovery import open_recovery, recover, settings_for
from holotype.compress.sensitivity import most_sensitive
from holotype.compress.structured import remove_channels
from holotype.compress.student import open_student, teach_student
from holotype.compress.workshop import Made, Measured, Method, Workshop
from holotype.config import CompressConfig, TrainConfig
from holotype.errors import ModelError
from holotype.fit import Session
from holotype.machine import available_cores
from holotype.models import Classifier, save_weights
from holotype.onnx_export import convert_openvino, export_onnx
from holotype.policy import Policy, probabilities, total_variation
from holotype.preprocess import Preprocess
from holotype.progress import note
from holotype.quantize import (
    CALIBRATIONS,
    OPSET,
    Calibration,
    Ranges,
    dynamic_int8,
    fold_normalisation,
    is_transformer,
    observe,
    opset_of,
    quantize,
)
from holotype.runtime import load_onnx_model

__all__ = ["steps"]

_FLOATS: dict[str, Precision] = {"openvino": "fp32", "bf16": "bf16"}


def _bf16(shop: Workshop, _: Sequence[Measured]) -> Iterator[Made]:
    """The same network in OpenVINO: in fp32, and with weights in half precision computed in bf16."""
    for name, precision in _FLOATS.items():
        folder = shop.scratch(name)
        folder.mkdir(exist_ok=True)
        xml, weights = convert_openvino(shop.original, folder, half=precision == "bf16")
        yield Made(name, {}, {"openvino": xml, "openvino_weights": weights}, precision)


def _int8(shop: Workshop, _: Sequence[Measured]) -> Iterator[Made]:
    """One candidate, by the calibration that changes answers least; for a transformer also a dynamic one."""
    calibration, model, told = _best_int8(shop, shop.model, shop.ranges, panel=shop.panel)
    yield _in_integers(shop, "int8", model, {"calibration": calibration, "compared": told})
    if is_transformer(shop.model):
        yield _in_integers(shop, "int8-dynamic", dynamic_int8(shop.original), {})


def _mixed(shop: Workshop, before: Sequence[Measured]) -> Iterator[Made]:
    """INT8 with the layers in float that lose most, one more in each candidate, twice as many in the next."""
    calibration = _calibration_of(before)
    count = 1
    while count <= shop.config.int8.floats:
        floats = most_sensitive(shop.sensitivity(calibration), count=count)
        model = quantize(shop.model, shop.ranges, calibration=calibration, floats=floats)
        yield _in_integers(shop, f"mixed-{count}", model, {"calibration": calibration, "floats": floats})
        count *= 2


def _structured(shop: Workshop, before: Sequence[Measured], *, sparsity: float) -> Iterator[Made]:
    """A network with fewer channels, which loads and trains again, and its INT8 graph."""
    settings, network = shop.config.structured, shop.network()
    name = f"pruned-{round(100 * sparsity)}"
    for step in range(1, settings.steps + 1):
        # Equal shares of what is there, so that after all steps `sparsity` is gone.
        share = 1 - (1 - sparsity) ** (1 / settings.steps)
        network = remove_channels(network, share=share, round_to=settings.round_to)
        session = _session(shop, network, name=f"{name}-{step}", epochs=settings.epochs, settle=True)
        accuracy = recover(session).scores.accuracy
        network = session.classifier.cpu().eval()
        note(f"pruned {sparsity:.0%}, step {step}/{settings.steps}: {accuracy:.1%} on validation")
    told = {"sparsity": sparsity, **settings.model_dump(exclude={"sparsities"})}
    yield from _in_both(shop, before, name, network, told, panel=shop.panel)


def _qat(shop: Workshop, before: Sequence[Measured]) -> Iterator[Made]:
    """The graph of INT8 after training, trained as it is."""
    calibration, settings = _calibration_of(before), shop.config.qat
    model = quantize(shop.model, shop.ranges, calibration=calibration)
    session = _session(shop, shop.network(), name="qat-training", epochs=settings.epochs)
    rounded = train_rounded(
        session, model, original=shop.model, judge=lambda tried: _accuracy(shop.panel, tried), config=settings
    )
    proof = rounded.proof
    note(f"the file gives {proof.agreement:.2%} of {proof.images} images the trained graph's label")
    told = {
        "calibration": calibration,
        "epoch": rounded.epoch,
        "parity": asdict(proof),
        **settings.model_dump(),
    }
    yield _in_integers(shop, "qat", rounded.model, told)


def _student(shop: Workshop, before: Sequence[Measured]) -> Iterator[Made]:
    """A smaller network taught by the bundle, in float and in INT8."""
    settings = shop.config.student
    _could_be_small(shop, before)
    session = open_student(
        shop.panel.dataset.source,
        shop.network(),
        _training(shop, epochs=settings.epochs),
        settings,
        folder=shop.scratch("student-training"),
        device=shop.device,
    )
    learned = teach_student(session)
    network = session.classifier.cpu().eval()
    name = network.architecture.name
    note(f"{name} at {session.spec.height} pixels: {learned.scores.accuracy:.1%} on validation")
    told = {**settings.model_dump(), "name": name, "size": session.spec.height}
    panel = open_panel(session.dataset, shop.panel.classes)
    yield from _in_both(shop, before, "student", network, told, panel=panel)


def _could_be_small(shop: Workshop, before: Sequence[Measured]) -> None:
    """`ModelError` where the own network is too large even in INT8: on smaller images it is no smaller."""
    limit = shop.config.budget.size
    int8 = next((one.candidate.bytes for one in before if one.made.method == "int8"), 0)
    if shop.config.student.name is not None or limit is None or int8 <= limit:
        return
    error = ModelError(
        f"its own network has {int8 / 1e6:.2f} MB in INT8 on images of any size, the limit is"
        f" {limit / 1e6:.2f}",
        fix="name a smaller student (--set student.name=...)",
    )
    if shop.config.search == "enough":
        raise error
    note(f"student: {error}")


def _magnitude(shop: Workshop, before: Sequence[Measured]) -> Iterator[Made]:
    """Small weights set to 0, in float and in INT8."""
    settings, network = shop.config.magnitude, shop.network()
    zeros = zero_small_weights(network, settings)
    if settings.epochs:
        session = _session(shop, network, name="magnitude-training", epochs=settings.epochs)
        with zeros_kept(session.classifier, zeros):
            recover(session)
        network = session.classifier.cpu().eval()
    told = {**settings.model_dump(), "zeros": zeros.share}
    yield from _in_both(shop, before, "magnitude", network, told, panel=shop.panel)


def steps(config: CompressConfig) -> Iterator[tuple[str, Method]]:
    """What may be tried, from cheap to dear, by name: each is done as a whole or not."""
    methods: dict[str, Method] = {
        "bf16": _bf16,
        "int8": _int8,
        "mixed": _mixed,
        "qat": _qat,
        "student": _student,
        "magnitude": _magnitude,
    }
    for name in config.methods:
        if name == "structured":
            for sparsity in config.structured.sparsities:
                yield f"{name} {sparsity:g}", partial(_structured, sparsity=sparsity)
        else:
            yield name, methods[name]


def _in_both(
    shop: Workshop,
    before: Sequence[Measured],
    name: str,
    network: Classifier,
    settings: Mapping[str, Any],
    *,
    panel: Panel,
) -> Iterator[Made]:
    """A network that was made of the bundle's, in float; and, once that is measured, its INT8 graph."""
    made = _in_torch(shop, name, network, settings, spec=panel.dataset.spec)
    yield made
    model = fold_normalisation(onnx.load(made.files["onnx"]))
    ranges = observe(model, shop.calibration_of(panel), threads=available_cores())
    calibration, rounded, told = _best_int8(shop, model, ranges, panel=panel)
    more = {**settings, "calibration": calibration, "compared": told}
    yield _in_integers(shop, f"{name}-int8", rounded, more, of=before[-1], spec=panel.dataset.spec)


def _best_int8(
    shop: Workshop, model: onnx.ModelProto, ranges: Ranges, *, panel: Panel
) -> tuple[Calibration, onnx.ModelProto, Mapping[Calibration, Mapping[str, float]]]:
    """The calibration that was asked for, or the one that changes answers least; its graph, and all scores.

    That is: whose probabilities on the panel have the least mean distance to those of the float `model`.
    Accuracy is told, but does not choose: a label or two more that are right by luck would outweigh answers
    that moved further.
    """
    wanted = shop.config.int8.calibration
    tried = CALIBRATIONS if wanted == "auto" else (wanted,)
    models = {name: quantize(model, ranges, calibration=name) for name in tried}
    before = _logits(panel, model)
    scores = {
        name: _scores(_logits(panel, one), before, panel, policy=shop.source.manifest.policy)
        for name, one in models.items()
    }
    best = min(tried, key=lambda name: scores[name]["shift"])
    told = (
        f"{name} {one['accuracy']:.1%}, {one['agreement']:.1%} of labels kept, probabilities"
        f" {100 * one['shift']:.2f} points away"
        for name, one in scores.items()
    )
    note(f"INT8 on validation: {'; '.join(told)}")
    return best, models[best], scores


def _scores(after: Logits, before: Logits, panel: Panel, *, policy: Policy) -> dict[str, float]:
    """Accuracy, the share of labels that stay, and the mean total variation distance of probabilities."""
    chances = (probabilities(logits, policy=policy) for logits in (before, after))
    labels = after.argmax(axis=1)
    return {
        "accuracy": float((labels == panel.labels).mean()),
        "agreement": float((labels == before.argmax(axis=1)).mean()),
        "shift": total_variation(*chances),
    }


def _calibration_of(before: Sequence[Measured]) -> Calibration:
    """The one that INT8 was best with, where it was tried."""
    for one in before:
        if one.made.method == "int8":
            found: Calibration = one.made.settings["calibration"]
            return found
    return "min-max"


def _accuracy(panel: Panel, model: onnx.ModelProto) -> float:
    return float((_logits(panel, model).argmax(axis=1) == panel.labels).mean())


def _logits(panel: Panel, model: onnx.ModelProto) -> Logits:
    return answers(load_onnx_model(model, threads=available_cores()), panel)


def _session(shop: Workshop, network: Classifier, *, name: str, epochs: int, settle: bool = False) -> Session:
    """`settle`: batch norm takes its statistics anew: what is left of the channels sums to something else."""
    config = _training(shop, epochs=epochs)
    if settle:
        config = config.model_copy(update={"fit": config.fit.model_copy(update={"freeze_norm": False})})
    return open_recovery(
        shop.panel.dataset.source,
        network,
        config,
        folder=shop.scratch(name),
        device=shop.device,
    )


def _training(shop: Workshop, *, epochs: int) -> TrainConfig:
    return settings_for(shop.source, data=shop.config.data, epochs=epochs, seed=shop.config.seed)


def _in_integers(
    shop: Workshop,
    name: str,
    model: onnx.ModelProto,
    settings: Mapping[str, Any],
    *,
    of: Measured | None = None,
    spec: Preprocess | None = None,
) -> Made:
    folder = shop.scratch(name)
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    files: dict[PayloadName, Path] = {"onnx": folder / "model.onnx"}
    return Made(name, {**settings, "opset": opset_of(model)}, files, "int8", parent=of, preprocess=spec)


def _in_torch(
    shop: Workshop,
    name: str,
    network: Classifier,
    settings: Mapping[str, Any],
    *,
    spec: Preprocess,
) -> Made:
    folder = shop.scratch(name)
    folder.mkdir(exist_ok=True)
    save_weights(network, folder / "weights.safetensors")
    write_text(folder / "architecture.json", network.architecture.model_dump_json(indent=1))
    export_onnx(network, folder / "model.onnx", classes=shop.panel.classes, preprocess=spec)
    files: dict[PayloadName, Path] = {
        "weights": folder / "weights.safetensors",
        "architecture": folder / "architecture.json",
        "onnx": folder / "model.onnx",
    }
    return Made(name, {**settings, "opset": OPSET}, files, "fp32", preprocess=spec)
