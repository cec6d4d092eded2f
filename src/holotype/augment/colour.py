"""The jitter of hue, saturation and value as one fused operation that never leaves RGB."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from holotype.augment.draws import Jitter

__all__ = ["jitter_colours"]

# Levels that chroma is taken too large by, so that grey and black need no branch.
_LEAST = 1e-3
# No saturation scales by 0, which divided by black is no number.
_TINY = 1e-9


def jitter_colours(planes: torch.Tensor, jitter: Jitter) -> torch.Tensor:
    """Turn the hue and scale S and V of `float32[N, 3, H, W]` in [0, 255], as RGB → HSV → RGB.

    It is that to 0.002 levels; S and V are clipped at their ends. With M, m and d the largest, smallest and
    middle of (R, G, B), c = M - m and a turn by t sextants, |t| <= 1, the hexcone model (Smith 1978) becomes

        R' = clip(2 R - d - sgn(G - B) t c, m, M), and so on around the circle (G: B - R, B: R - G),

    since M and m stay and every channel is a trapezoid of the hue. Larger turns begin with turns by 120
    degrees, which only exchange the channels. S and V follow: R'' = M'' - k (M - R') with M'' = min(v M, 255)
    and k = M'' min(s / M, 1 / c). No hue is computed, there are no branches and few passes over the pixels.
    """
    thirds = np.round(jitter.hue / 120)
    if thirds.any():
        order = torch.from_numpy((np.arange(3) - thirds[:, None].astype(np.int64)) % 3).to(planes.device)
        planes = planes[torch.arange(len(planes), device=planes.device)[:, None], order]
    sextants = jitter.hue / 60 - 2 * thirds
    saturation, value = _column(np.maximum(jitter.saturation, _TINY), planes), _column(jitter.value, planes)
    red, green, blue = (planes[:, channel : channel + 1] for channel in range(3))
    result = torch.empty_like(planes)
    # Memory is used again as soon as it may be: what passes over the pixels should find them in the cache.
    top = torch.maximum(red, green)
    torch.maximum(top, blue, out=top)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    offset = torch.add(red, green).add_(blue).sub_(low)  # M + d
    chroma = torch.sub(top, low.sub_(_LEAST), out=low)
    gain = torch.div(saturation, top)
    bright = top.mul_(value).clamp_(max=255)
    torch.minimum(gain, torch.reciprocal(chroma, out=result[:, :1]), out=gain).mul_(bright)
    chroma.mul_(gain)
    # R'' = 2 k R - sgn(G - B) k t c + M'' - k (M + d), clipped to what m and M have become.
    torch.sub(bright, offset.mul_(gain), out=offset)
    for channel, (after, before) in enumerate(((green, blue), (blue, red), (red, green))):
        torch.sub(after, before, out=result[:, channel : channel + 1])
    torch.copysign(chroma * _column(np.abs(sextants), planes), result, out=result)
    torch.addcmul(offset, result, _column(-np.sign(sextants), planes), out=result)
    result.addcmul_(planes, gain.mul_(2))
    return torch.clamp(result, torch.sub(bright, chroma, out=chroma), bright, out=result)


def _column(values: npt.NDArray[np.float64], like: torch.Tensor) -> torch.Tensor:
    """One number for each image, `float32[N, 1, 1, 1]`."""
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None, None]
