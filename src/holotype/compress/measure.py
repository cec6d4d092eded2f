"""What a candidate is worth: timed in every way to run it here, then judged and written in the fastest.

Runtimes round integers differently, so a candidate's accuracy belongs to the runtime that it was measured in:
it is measured in the one that will serve it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from holotype.baseline import write_baseline
from holotype.bundle import (
    Bundle,
    Golden,
    PayloadName,
    library_versions,
    read_golden,
    write_bundle,
    write_golden,
)
from holotype.calibrate import fit_policy
from holotype.compress.contract import Candidate
from holotype.compress.judge import Panel, Verdict, compare
from holotype.compress.workshop import Made, Measured, Workshop
from holotype.errors import BundleError
from holotype.machine import available_cores
from holotype.parity import LEAST_IMAGES, choose_golden, sample_rows
from holotype.runtime import Runtime, load_onnx, load_openvino, open_runtime, served_bytes, served_files
from holotype.timing import Setup, Timing, race, refusal, setups_of

__all__ = ["measure", "measure_parent"]

_SECONDS = 0.12  # of a turn in a candidate's first timing, which has half as many as the race that decides


def measure_parent(shop: Workshop) -> Measured:
    """The bundle as it is, in float onnxruntime: what people have today."""
    started = time.perf_counter()
    manifest = shop.source.manifest
    files = {name: shop.source.path / payload.path for name, payload in manifest.payloads.items()}
    made = Made("parent", {}, files, manifest.precision)
    (timing,) = _race([_reference(shop)], shop)
    verdict = compare(shop.before, shop.before, shop.panel)
    candidate = _candidate(made, shop.source, verdict, timing, started=started)
    return Measured(made, candidate, shop.source, shop.before)


def measure(made: Made, shop: Workshop, *, parent: Candidate, started: float) -> Measured:
    """Time it beside its parent, then judge it on validation, refit its policy and write its bundle.

    `BundleError` with the reasons where no way to run it here gives its golden outputs.
    """
    panel = shop.panel_for(made)
    draft = _draft(made, shop, panel)
    *timings, reference = _race([*_ways(draft), _reference(shop)], shop)
    best = min(timings, key=lambda timing: timing.batches[1].p50)
    runtime = open_runtime(draft, name=best.setup.runtime, precision=best.setup.precision)
    fitted = fit_policy(runtime, panel.dataset, classes=panel.classes, config=shop.config.policy)
    baseline = shop.scratch(f"baseline-{made.method}.npz")
    write_baseline(baseline, fitted.baseline)
    accuracy = float((fitted.logits.argmax(axis=1) == panel.labels).mean())
    bundle = _write(
        made,
        shop,
        {"golden": _golden(made, shop, panel, runtime), "baseline": baseline},
        {
            "policy": fitted.policy,
            "metrics": {"validation": {"accuracy": accuracy}},
            "compression": {
                "method": made.method,
                **made.settings,
                "judged_in": {"runtime": best.setup.runtime, "precision": best.setup.precision},
            },
        },
    )
    verdict = compare(shop.before, fitted.logits, panel)
    candidate = _candidate(made, bundle, verdict, best, started=started)
    return Measured(made, _as_fast_as_then(candidate, reference, parent), bundle, fitted.logits)


def _reference(shop: Workshop) -> Setup:
    return Setup(shop.source.path, "onnxruntime", "fp32")


def _race(setups: list[Setup], shop: Workshop) -> list[Timing]:
    return race(setups, batches=(1, 8), rounds=(shop.config.rounds + 1) // 2, seconds=_SECONDS)


def _ways(draft: Bundle) -> list[Setup]:
    """Those to run a bundle in which it gives its golden outputs; `BundleError` where there is none."""
    found, reasons = [], []
    for setup in setups_of(draft):
        reason = refusal(setup)
        if reason is None:
            found.append(setup)
        else:
            reasons.append(reason)
    if not found:
        told = "; ".join(reasons) or "nothing that could run it is installed"
        raise BundleError(f"cannot be used in any runtime here ({told})")
    return found


def _draft(made: Made, shop: Workshop, panel: Panel) -> Bundle:
    """The candidate as a bundle that can be timed: with its parent's policy, and what its file says."""
    golden = _golden(made, shop, panel, _open(made))
    return _write(made, shop, {"golden": golden}, {"compression": {"method": made.method}})


def _open(made: Made) -> Runtime:
    threads = available_cores()
    if "onnx" in made.files:
        return load_onnx(made.files["onnx"], threads=threads)
    return load_openvino(
        made.files["openvino"],
        threads=threads,
        half=made.precision == "bf16",
        weights=made.files["openvino_weights"],
    )


def _golden(made: Made, shop: Workshop, panel: Panel, runtime: Runtime) -> Path:
    """The parent's golden inputs, or others where it sees other images, with what `runtime` says of them."""
    file = shop.scratch(f"golden-{made.method}.npz")
    if panel is shop.panel:
        images = read_golden(shop.source).images
        write_golden(file, Golden(images, runtime.run(images).logits))
    else:
        rows = sample_rows(panel.dataset, count=LEAST_IMAGES)
        images = np.concatenate(list(panel.dataset.pixels([rows])))
        write_golden(file, choose_golden(runtime, images))
    return file


def _write(
    made: Made, shop: Workshop, files: Mapping[PayloadName, Path], changes: Mapping[str, Any]
) -> Bundle:
    source = made.parent.bundle if made.parent is not None else shop.source
    manifest = shop.source.manifest
    manifest = manifest.model_copy(
        update={
            "precision": made.precision,
            "preprocess": made.preprocess or manifest.preprocess,
            "lineage": manifest.lineage.model_copy(update={"parent": source.hash}),
            "versions": library_versions(),
            "settings": {**manifest.settings, "policy": shop.config.policy.model_dump(mode="json")},
            **changes,
        }
    )
    return write_bundle(shop.folder / made.method, manifest, files={**made.files, **files})


def _candidate(made: Made, bundle: Bundle, verdict: Verdict, best: Timing, *, started: float) -> Candidate:
    worst, runtime = verdict.worst, best.setup.runtime
    return Candidate(
        method=made.method,
        settings=dict(made.settings),
        bundle=str(bundle.path),
        bytes=served_bytes(bundle, runtime),
        compressed_bytes=sum(len(zlib.compress(file.read_bytes())) for file in served_files(bundle, runtime)),
        accuracy=verdict.accuracy,
        drop=verdict.drop,
        class_drop=worst.drop,
        worst_class=worst.name,
        class_drops={one.name: one.drop for one in verdict.classes},
        agreement=verdict.agreement,
        latency_ms=best.batches[1].p50,
        throughput=best.batches[8].images_per_second,
        runtime=runtime,
        precision=best.setup.precision,
        seconds=time.perf_counter() - started,
    )


def _as_fast_as_then(candidate: Candidate, now: Timing, parent: Candidate) -> Candidate:
    """Latency and throughput as they would have been when the parent was timed: by its own in either race.

    A machine's speed changes from one minute to another, and a search takes many.
    """
    return candidate.model_copy(
        update={
            "latency_ms": candidate.latency_ms * parent.latency_ms / now.batches[1].p50,
            "throughput": candidate.throughput * parent.throughput / now.batches[8].images_per_second,
        }
    )
