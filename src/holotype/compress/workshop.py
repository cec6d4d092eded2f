"""What every method of compression works with, and what it hands over to be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from pydantic import TypeAdapter

from holotype.bundle import Bundle, PayloadName, Precision, write_bytes
from holotype.compress.contract import Candidate, Layer
from holotype.compress.judge import Logits, Panel, open_panel
from holotype.compress.sensitivity import layer_costs
from holotype.config import CompressConfig
from holotype.dataset import open_dataset
from holotype.errors import ModelError
from holotype.machine import available_cores
from holotype.models import Classifier, open_network
from holotype.preprocess import Pixels, Preprocess
from holotype.quantize import Calibration, Ranges, calibration_rows, fold_normalisation, observe

__all__ = ["Made", "Measured", "Method", "Workshop"]


@dataclass(frozen=True)
class Made:
    """A model that a method has made: the files of its bundle, and the arithmetic it is meant for.

    `parent` is what it was made of, None: the bundle that is compressed; `preprocess` None: that bundle's.
    """

    method: str
    settings: Mapping[str, Any]
    files: Mapping[PayloadName, Path]
    precision: Precision
    parent: Measured | None = None
    preprocess: Preprocess | None = None


@dataclass(frozen=True)
class Measured:
    """A candidate with what was made, and its logits `float32[N, C]` on validation."""

    made: Made
    candidate: Candidate
    bundle: Bundle
    logits: Logits


@dataclass(frozen=True)
class Workshop:
    """The bundle to compress, the images that decide, and what is computed of them once."""

    source: Bundle
    panel: Panel
    before: Logits
    config: CompressConfig
    folder: Path
    device: str

    @property
    def original(self) -> Path:
        """The float ONNX file of the bundle."""
        return self.source.path / self.source.manifest.payloads["onnx"].path

    def network(self) -> Classifier:
        """The bundle's network, fresh from its files; `ModelError` where it has no weights to train."""
        if "weights" not in self.source.manifest.payloads:
            raise ModelError("the bundle has no torch weights to train")
        return open_network(*self.source.network_files(fix="compress what train wrote"))

    def sensitivity(self, calibration: Calibration) -> tuple[Layer, ...]:
        """What rounding each layer alone costs, on some of the validation images; computed once."""
        if not self.sensitivities:
            rows = self.sensitivity_rows
            places = np.searchsorted(self.panel.rows, rows)
            costs = layer_costs(
                self.model,
                self.ranges,
                np.concatenate(list(self.panel.dataset.pixels([rows]))),
                self.panel.labels[places].tolist(),
                calibration=calibration,
                policy=self.source.manifest.policy,
            )
            write_bytes(self._costs, _LAYERS.dump_json(costs))
        return self.sensitivities

    @property
    def sensitivity_rows(self) -> npt.NDArray[np.int64]:
        """The validation images on which layers are rounded alone."""
        return self.panel.rows[:: max(len(self.panel) // _SENSITIVITY_IMAGES, 1)]

    @property
    def sensitivities(self) -> tuple[Layer, ...]:
        """What is known of them; empty where no method asked."""
        return _LAYERS.validate_json(self._costs.read_bytes()) if self._costs.exists() else ()

    @property
    def _costs(self) -> Path:
        return self.scratch("sensitivity.json")

    def panel_for(self, made: Made) -> Panel:
        """The validation split as `made` sees it."""
        if made.preprocess in (None, self.source.manifest.preprocess):
            return self.panel
        source = self.panel.dataset.source
        dataset = open_dataset(source, spec=made.preprocess, config=self.config.data)
        return open_panel(dataset, self.panel.classes)

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The float graph that all quantization starts from: it reads pixels as they are."""
        return fold_normalisation(onnx.load(self.original))

    def calibration_of(self, panel: Panel) -> Pixels:
        """`uint8[N, H, W, 3]` of the training split, equally many of each class, through the pixel path."""
        rows = calibration_rows(panel.dataset, count=self.config.int8.images, seed=self.config.seed)
        return np.concatenate(list(panel.dataset.pixels([rows])))

    @cached_property
    def ranges(self) -> Ranges:
        """Of the activations of `model`."""
        return observe(self.model, self.calibration_of(self.panel), threads=available_cores())

    def scratch(self, name: str) -> Path:
        """A fresh file or folder name for what a method makes."""
        folder = self.folder / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


_SENSITIVITY_IMAGES = 128
_LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])

Method = Callable[[Workshop, Sequence[Measured]], Iterator[Made]]
"""Makes candidates of a workshop, knowing those that were measured before.

`ModelError` where the network does not allow it.
"""
