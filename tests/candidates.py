"""Candidates of compression as if they had been measured, with whatever figures a test wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from holotype.compress.contract import Candidate
from holotype.compress.workshop import Made, Measured
from holotype.report import Estimate

__all__ = ["candidate"]


def candidate(
    method: str,
    bundle: Path | str = "",
    *,
    drop: float = 0.0,
    size: float = 10.0,
    latency: float = 4.0,
    worst: float = 0.0,
) -> Measured:
    """One that loses `drop` points, `worst` of one class, with `size` in MB and `latency` in ms."""
    row = Candidate(
        method=method,
        settings={},
        bundle=str(bundle or method),
        bytes=round(size * 1e6),
        accuracy=0.9 - drop / 100,
        drop=Estimate(value=drop, low=drop - 1, high=drop + 1),
        class_drop=worst,
        worst_class="shirt",
        agreement=0.99,
        latency_ms=latency,
        throughput=1e3 / latency,
        runtime="onnxruntime",
        precision="fp32",
        seconds=1.0,
        compressed_bytes=round(size * 9e5),
    )
    return Measured(Made(method, {}, {}, "fp32"), row, None, np.zeros((1, 2), np.float32))  # type: ignore[arg-type]
