"""Whether two pictures are copies of one: laid over each other as well as possible, and compared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from holotype.machine import available_cores

__all__ = ["COARSE", "SIDE", "aligned_distance", "coarse_distance", "shrink", "symmetries"]

Floats = npt.NDArray[np.float32]

SIDE = 64
"""Side in pixels of the pictures that are compared: fine enough to tell a copy from another shot."""

COARSE = 16
"""Side of the pictures that are compared first."""

_LEVELS = ((16, 4), (32, 4))  # side and steps, from coarse to fine
_CLEAR, _HOPELESS = 0.01, 0.6  # distances that need no second look
_LEAST_OVERLAP = 0.7
_LARGEST_SCALE = 0.2
_CHUNK, _COARSE_CHUNK = 64, 1024  # pairs at once, so that they stay in the cache


class _Warp(NamedTuple):
    """Per pair `float32[K]`: (x, y) → (x + x_scale * x + x_shift, ...), coordinates in [-1, 1]."""

    x_scale: Floats
    x_shift: Floats
    y_scale: Floats
    y_shift: Floats


def shrink(images: Floats, side: int) -> Floats:
    """`float32[N, C, side, side]`: means over blocks of `[N, C, S, S]`, S a multiple of `side`."""
    count, channels, size, _ = images.shape
    block = size // side
    blocks = images.reshape(count, channels, side, block, side, block)
    return np.asarray(blocks.mean(axis=(3, 5)), dtype=np.float32)


def symmetries(images: Floats) -> list[Floats]:
    """`[N, C, S, S]` in all eight orientations: turned by quarters and mirrored."""
    both = (images, images.swapaxes(2, 3))
    return [image[:, :, ::down, ::across] for image in both for down in (1, -1) for across in (1, -1)]


def coarse_distance(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> Floats:
    """`float32[K]`: 1 - correlation of pairs `uint8[K, 3, S, S]`, in the best of eight orientations.

    Cheap, and for copies small: what fails here need not be aligned.
    """
    starts = range(0, len(first), _COARSE_CHUNK)
    parts = [
        1
        - _orientations(*(one[at : at + _COARSE_CHUNK].astype(np.float32) for one in (first, second))).max(0)
        for at in starts
    ]
    return np.concatenate(parts, dtype=np.float32) if parts else np.zeros(0, dtype=np.float32)


def aligned_distance(first: Floats, second: Floats) -> Floats:
    """`float32[K]` in [0, 2]: 1 - correlation of the detail of pairs `[K, 3, SIDE, SIDE]`, once aligned.

    The orientation among eight that correlates best is taken; then scale and shift along each axis are
    refined from coarse to fine by Gauss-Newton steps on the squared difference (Lucas & Kanade 1981; Baker &
    Matthews 2004), so that a crop lies over the picture it was cut from. Large shapes are not compared: two
    things of one kind on one floor differ in their detail alone. Brightness and contrast do not count. 2
    where the pictures overlap by less than 70 %.
    """
    starts = range(0, len(first), _CHUNK)
    # Many small products: threads of our own, for those of the linear algebra cost more than they save.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(available_cores()) as pool:
        parts = list(
            pool.map(lambda at: _distance(first[at : at + _CHUNK], second[at : at + _CHUNK]), starts)
        )
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _orientations(first: Floats, second: Floats) -> Floats:
    return np.stack([_correlation(turned, second) for turned in symmetries(first)])


def _distance(first: Floats, second: Floats) -> Floats:
    """The smaller distance of laying the first over the second and the second over the first."""
    distance = _one_way(first, second)
    doubtful = distance > _CLEAR
    if doubtful.any():
        back = _one_way(second[doubtful], first[doubtful])
        distance[doubtful] = np.minimum(distance[doubtful], back)
    return distance


def _one_way(first: Floats, second: Floats) -> Floats:
    best = _orientations(shrink(first, COARSE), shrink(second, COARSE)).argmax(axis=0)
    turned = first.copy()
    for orientation in np.unique(best[best > 0]):
        those = best == orientation
        turned[those] = symmetries(first[those])[orientation]
    nothing = np.zeros(len(first), dtype=np.float32)
    unmoved = warp = _Warp(nothing, nothing, nothing, nothing)
    fixed, moving = second, turned
    for side, steps in _LEVELS:
        fixed, moving = shrink(second, side), shrink(turned, side)
        grey = _grey(moving), _grey(fixed)
        for _ in range(steps):
            warp = _step(*grey, warp)
    before, after = _compare(moving, fixed, unmoved), _compare(moving, fixed, warp)
    warp = _Warp(*(np.where(after < before, new, old) for new, old in zip(warp, unmoved, strict=True)))
    distance = np.minimum(before, after)
    likely = distance < _HOPELESS
    if likely.any():
        chosen = _Warp(*(part[likely] for part in warp))
        distance[likely] = _compare(turned[likely], second[likely], chosen)
    return distance


def _step(moving: Floats, fixed: Floats, warp: _Warp) -> _Warp:
    """One Gauss-Newton step for scale and shift (and for gain and offset, which are dropped)."""
    sampled, inside = _sample(moving, warp)
    seen, count, side = sampled[:, 0], len(moving), moving.shape[2]
    down, across = np.gradient(seen, axis=(1, 2))
    grid = _grid(side)
    across, down = across * (side / 2), down * (side / 2)
    columns = (across * grid, across, down * grid[:, None], down, seen, np.ones_like(seen))
    design = (np.stack(columns, axis=1) * inside[:, None]).reshape(count, 6, side * side)
    error = ((fixed[:, 0] - seen) * inside).reshape(count, side * side, 1)
    normal = design @ design.transpose(0, 2, 1)
    size = np.trace(normal, axis1=1, axis2=2)[:, None, None] / 6
    ridge = np.eye(6, dtype=np.float32) * (1e-4 * size + 1e-6)
    change = np.linalg.solve(normal + ridge, design @ error)[..., 0]
    limit = _LARGEST_SCALE
    return _Warp(*(np.clip(old + change[:, i], -limit, limit) for i, old in enumerate(warp)))


def _compare(moving: Floats, fixed: Floats, warp: _Warp) -> Floats:
    seen, inside = _sample(moving, warp)
    overlap = inside.mean(axis=(1, 2))
    distance = 1 - _correlation(_detail(seen), _detail(fixed), inside=inside)
    return np.where(overlap >= _LEAST_OVERLAP, distance, 2.0).astype(np.float32)


def _detail(images: Floats) -> Floats:
    """`[K, C, S, S]` between two Gaussian blurs, of sigma 3 S / 128 and S / 16.

    Finer than that is noise and the moire of textures, which a crop resamples.
    """
    side = images.shape[2]
    return np.asarray(_blur(images, 3 * side / 128) - _blur(images, side / 16), dtype=np.float32)


def _blur(images: Floats, sigma: float) -> Floats:
    side = images.shape[2]
    away = np.arange(side)[:, None] - np.arange(side)
    kernel = np.exp(-0.5 * (away / sigma) ** 2)
    kernel = (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)
    rows = (images.reshape(-1, side) @ kernel.T).reshape(images.shape)
    return np.asarray(np.matmul(kernel, rows), dtype=np.float32)


def _sample(images: Floats, warp: _Warp) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Bilinear samples `[K, C, S, S]` of the warped images, and which of them lie inside `[K, S, S]`."""
    side = images.shape[2]
    across, inside_across = _interpolation(warp.x_scale, warp.x_shift, side)
    down, inside_down = _interpolation(warp.y_scale, warp.y_shift, side)
    seen = np.matmul(np.matmul(down[:, None], images), across[:, None].swapaxes(2, 3))
    return seen, inside_down[:, :, None] & inside_across[:, None, :]


def _interpolation(scale: Floats, shift: Floats, side: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Matrices `[K, S, S]` that interpolate linearly along one axis, and which samples lie inside."""
    place = ((_grid(side) * (1 + scale[:, None]) + shift[:, None]) + 1) * (side / 2) - 0.5
    inside = (place >= -0.5) & (place <= side - 0.5)
    place = np.clip(place, 0, side - 1)
    weights = np.maximum(0, 1 - np.abs(place[:, :, None] - np.arange(side, dtype=np.float32)))
    return weights.astype(np.float32), inside


def _correlation(first: Floats, second: Floats, *, inside: npt.NDArray[np.bool_] | None = None) -> Floats:
    """Correlation of all pixels and channels of each pair; 0 where one of the two is flat."""
    count = len(first)
    a = first.reshape(count, -1)
    b = second.reshape(count, -1)
    share = np.full_like(a, 1 / a.shape[1])
    if inside is not None:
        total = inside.sum(axis=(1, 2)) * first.shape[1]
        weight = inside[:, None] / np.maximum(total, 1)[:, None, None, None]
        share = np.broadcast_to(weight, first.shape).reshape(count, -1).astype(np.float32)
    a = a - np.einsum("kp,kp->k", a, share)[:, None]
    b = b - np.einsum("kp,kp->k", b, share)[:, None]
    weighted = a * share
    together = np.einsum("kp,kp->k", weighted, b)
    spread = np.sqrt(np.einsum("kp,kp->k", weighted, a) * np.einsum("kp,kp,kp->k", b, b, share))
    return np.where(spread > 1e-3, together / np.maximum(spread, 1e-3), 0.0).astype(np.float32)


def _grid(side: int) -> Floats:
    return ((np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1).astype(np.float32)


def _grey(images: Floats) -> Floats:
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return np.asarray(np.tensordot(images, weights, axes=(1, 0))[:, None], dtype=np.float32)
