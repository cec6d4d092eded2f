"""The golden check: a bundle still answers as it did when it was written."""

from __future__ import annotations

import numpy as np

from holotype.bundle import Bundle, Golden, read_golden
from holotype.errors import BundleError
from holotype.policy import probabilities, total_variation
from holotype.runtime.contract import Precision, Runtime

__all__ = ["verify_golden"]

# Golden outputs come from another machine's kernels, or another runtime's. In fp32 sums in other orders
# differ by about 1e-5.
_EXACT = 1e-3
# Less exact arithmetic rounds differently, and golden inputs are those that the network is least sure about:
# one of them may move by 0.2 where nothing is wrong, all of them together do not.
_ROUNDED = {"fp16": 0.02, "bf16": 0.1, "int8": 0.15}


def verify_golden(runtime: Runtime, bundle: Bundle, *, precision: Precision = "fp32") -> None:
    """Run the golden inputs; `BundleError` when the probabilities are too far from the stored ones.

    In fp32 no probability may differ by more than 1e-3. In less, which is that in which the bundle was
    accepted, or `precision`, in which it is run, their mean total variation distance has a limit.
    """
    golden = _golden_that_fits(bundle)
    try:
        logits = runtime.run(golden.images).logits
    except Exception as error:
        raise BundleError(
            f"the model fails on its golden inputs under {runtime.name} ({error})", where=bundle.path
        ) from error
    if logits.shape != golden.logits.shape:
        raise BundleError(
            f"the model gives logits {logits.shape}, the manifest and golden outputs {golden.logits.shape}",
            where=bundle.path,
        )
    policy = bundle.manifest.policy
    with np.errstate(invalid="ignore"):  # infinite logits become NaN, which is refused below
        got, wanted = probabilities(logits, policy=policy), probabilities(golden.logits, policy=policy)
    allowed = max(_ROUNDED.get(used, _EXACT) for used in (bundle.manifest.precision, precision))
    gap = float(np.abs(got - wanted).max()) if allowed == _EXACT else total_variation(got, wanted)
    if not gap <= allowed:  # also true for NaN
        raise BundleError(
            f"golden outputs differ by {gap:.2g} in probability under {runtime.name}",
            where=bundle.path,
            fix="export the bundle again on this machine",
        )


def _golden_that_fits(bundle: Bundle) -> Golden:
    golden = read_golden(bundle)
    count, spec = len(golden.images), bundle.manifest.preprocess
    images, logits = (count, spec.height, spec.width, 3), (count, len(bundle.manifest.classes))
    if count == 0 or golden.images.shape != images or golden.logits.shape != logits:
        raise BundleError(
            f"golden arrays {golden.images.shape} and {golden.logits.shape} should be {images} and {logits} "
            "by the manifest",
            where=bundle.path,
        )
    return golden
