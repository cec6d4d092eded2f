"""Rounding to a few levels whose distance is learned: LSQ (Esser et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Levels", "rounded"]


@dataclass(frozen=True)
class Levels:
    """The least and the largest, where 0 means 0, and the share of the scale's gradient that is taken."""

    low: int
    high: int
    share: float


def rounded(value: torch.Tensor, scale: torch.Tensor, levels: Levels) -> torch.Tensor:
    """x → y = s clamp(round(x / s), low, high), halves to even; `scale: float[1]`.

    The gradient of x passes where nothing was clamped; that of s is the sum of g (y - x) / s over these and
    of g y / s over the others, times the share.

    torch has it as one operation (`_fake_quantize_learnable_per_tensor_affine`), which on a CPU takes several
    times as long as these passes over memory.
    """
    result: torch.Tensor = _Rounding.apply(value, scale, levels)
    return result


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, scale: torch.Tensor, levels: Levels) -> torch.Tensor:
        result = (value / scale).round_().clamp_(levels.low, levels.high).mul_(scale)
        ctx.save_for_backward(value, result, scale)
        ctx.levels = levels
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,), levels = gradients, ctx.levels
        value, result, scale = ctx.saved_tensors
        step = float(scale)  # asked for once: on a GPU it waits for all that was begun
        passed = torch.ops.aten.hardtanh_backward(
            gradient, value, (levels.low - 0.5) * step, (levels.high + 0.5) * step
        )
        # Sums of products in the order of memory: a dot product would need both in one row first.
        inside = (result - value).mul_(passed).sum()
        outside = (gradient - passed).mul_(result).sum()
        return passed, levels.share / scale * (inside + outside), None
