"""Heat maps of a served bundle: from its exported graph where that allows it, else from its torch network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from holotype.cam import open_cam
from holotype.errors import ModelError
from holotype.predictor import Predictor
from holotype.preprocess import Pixels
from holotype.progress import warn

__all__ = ["HeatMaps", "open_heat_maps"]

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeatMaps:
    """How heat maps are made here; `method` None where they are not, and `why_not`."""

    method: Literal["cam", "grad-cam"] | None
    why_not: str
    draw: Callable[[Pixels, str], Grid]


def open_heat_maps(predictor: Predictor) -> HeatMaps:
    """What this bundle allows with what is installed; nothing is loaded before the first heat map.

    Its answers are proven by then: a graph that this cannot make out is no reason to refuse it.
    """
    bundle = predictor.bundle
    try:
        cam = open_cam(bundle)
    except ModelError as error:
        reason = error.what
    except Exception as error:
        warn(f"no class activation maps: the graph of {bundle.path} is of an unknown kind ({error!r})")
        reason = "this graph is of a kind that is not known here"
    else:
        return HeatMaps("cam", "", lambda pixels, label: _rows(cam(pixels, predictor.classes.index(label))))
    if "weights" not in bundle.manifest.payloads:
        return HeatMaps(None, f"{reason}, and the bundle has no torch weights for gradients", _none)
    if importlib.util.find_spec("torch") is None:
        return HeatMaps(None, f"{reason}, and gradients need torch, which is not installed", _none)
    return HeatMaps("grad-cam", "", _by_gradients(predictor))


def _by_gradients(predictor: Predictor) -> Callable[[Pixels, str], Grid]:
    kept: list[Callable[[Pixels, int], np.ndarray]] = []

    def draw(pixels: Pixels, label: str) -> Grid:
        if not kept:
            kept.append(_gradients(predictor))
        return _rows(kept[0](pixels, predictor.classes.index(label)))

    return draw


def _gradients(predictor: Predictor) -> Callable[[Pixels, int], np.ndarray]:
    from holotype.models import open_network
    from holotype.saliency import heat_maps

    network = open_network(*predictor.bundle.network_files(fix="serve what train wrote"))
    step = max(predictor.bundle.manifest.preprocess.height // 14, 1)

    def draw(pixels: Pixels, label: int) -> np.ndarray:
        heat = heat_maps(network, pixels[None], np.array([label], dtype=np.int64))[0]
        return np.asarray(heat[::step, ::step])

    return draw


def _rows(grid: np.ndarray) -> Grid:
    return tuple(tuple(round(float(value), 3) for value in row) for row in grid)


def _none(_: Pixels, __: str) -> Grid:
    raise AssertionError("there are no heat maps here")
