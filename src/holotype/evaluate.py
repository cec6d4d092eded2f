"""`holotype evaluate`: a bundle measured on a dataset, with a report."""

from __future__ import annotations

import time
from pathlib import Path

from holotype.bundle import home_of
from holotype.config import EvaluateConfig
from holotype.dataset import dataset_name, open_for
from holotype.predictor import load
from holotype.report import Report
from holotype.scoring import choose_split, evaluate_split

__all__ = ["evaluate", "report_folder"]


def evaluate(
    target: Path | str,
    data: Path | str | None = None,
    *,
    config: EvaluateConfig | None = None,
    out: Path | str | None = None,
    device: str = "auto",
) -> Report:
    """Measure a bundle or run folder on a dataset (default: the one it was trained on).

    Writes report.json, report.html and confusion_matrix.png into `out`; by default beside the bundle, in
    `evaluate-DATA-SPLIT`.
    """
    started = time.perf_counter()
    config = config or EvaluateConfig()
    predictor = load(
        target,
        runtime=config.runtime,
        precision=config.precision,
        threads=config.threads,
        device=device,
    )
    dataset = open_for(predictor.bundle, data, config=config.data)
    split = choose_split(dataset, wanted=config.split)
    folder = Path(out) if out is not None else report_folder(Path(target), dataset.source, split)
    folder.mkdir(parents=True, exist_ok=True)
    return evaluate_split(predictor, dataset, split=split, folder=folder, started=started)


def report_folder(target: Path, source: Path, split: str) -> Path:
    """Where an evaluation goes by default."""
    return home_of(target) / f"evaluate-{dataset_name(source)}-{split}"
