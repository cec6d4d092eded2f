"""From a folder of images to an image classifier in production, with proof at every step.

from holotype import train, evaluate, load

run = train("photos", name="photos", preset="probe")
print(run.report.metrics.accuracy)
predictor = load(run.best)
print(predictor.predict("photo.jpg").label)
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holotype.audit import audit
    from holotype.benchmark import benchmark
    from holotype.compare import compare
    from holotype.compress import compress
    from holotype.convert import convert
    from holotype.evaluate import evaluate
    from holotype.explain import explain
    from holotype.export import export
    from holotype.hard_samples import hard_samples
    from holotype.predictor import Prediction, Predictor, load
    from holotype.train import TrainResult, train
    from holotype.tune import tune

__all__ = [
    "Prediction",
    "Predictor",
    "TrainResult",
    "__version__",
    "audit",
    "benchmark",
    "compare",
    "compress",
    "convert",
    "evaluate",
    "explain",
    "export",
    "hard_samples",
    "load",
    "train",
    "tune",
]

__version__ = "0.1.0"

_HOMES = {
    "Prediction": "predictor",
    "Predictor": "predictor",
    "TrainResult": "train",
    "audit": "audit",
    "benchmark": "benchmark",
    "compare": "compare",
    "compress": "compress",
    "convert": "convert",
    "evaluate": "evaluate",
    "explain": "explain",
    "export": "export",
    "hard_samples": "hard_samples",
    "load": "predictor",
    "train": "train",
    "tune": "tune",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `load` must not cost the import of torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'holotype' has no attribute {name!r}")
    return getattr(importlib.import_module(f"holotype.{_HOMES[name]}"), name)


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing holotype.train binds that module to the name `train`; users mean the function in it.
        if isinstance(value, types.ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
