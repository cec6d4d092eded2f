"""Hard samples and their neighbours as one self-contained HTML page."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from holotype.hard_samples.contract import HardSample, HardSamples
from holotype.report import Thumbnail, data_uri, write_html

__all__ = ["write_page"]

_SHOWN = 100
"""Hard images on the page; the CSV lists them all. One with all its neighbours weighs about 50 kB."""


def write_page(file: Path, result: HardSamples, *, thumbnail: Thumbnail) -> None:
    """Write `result` as HTML to `file`, atomically; `thumbnail` is asked once for each image shown."""
    shown = result.samples[:_SHOWN]
    paths = [path for sample in shown for path in _pictures(sample)]
    cells = Counter((sample.label, sample.predicted) for sample in result.samples if sample.margin < 0)
    write_html(
        file,
        "hard_samples.html.j2",
        package="holotype.hard_samples",
        filters={},
        content={
            "result": result,
            "shown": [(sample, _doubtful(sample)) for sample in shown],
            "cells": cells.most_common(5),
            "wrong": cells.total(),
            "thumbnails": {path: data_uri(thumbnail(path)) for path in dict.fromkeys(paths)},
            "command": f"holotype train {shlex.quote(result.dataset)} --focus {shlex.quote(result.file)}",
        },
    )


def _pictures(sample: HardSample) -> list[str]:
    return [sample.path, *(near.path for near in (*sample.neighbours, *sample.same_label))]


def _doubtful(sample: HardSample) -> bool:
    """Whether the label may be the mistake: the model and all its nearest training images say otherwise."""
    return sample.label != sample.predicted and all(
        near.label == sample.predicted for near in sample.neighbours
    )
