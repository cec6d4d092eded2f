"""The device that torch computes on."""

from __future__ import annotations

import torch

from holotype.errors import ConfigError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "mps" means; `ConfigError` where this machine has none."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if name not in available:
        raise ConfigError("unknown device", where=f"--device {name}", fix="use auto, cpu, cuda or mps")
    if not available[name]:
        raise ConfigError("this machine has none that torch can use", where=f"--device {name}", fix="use cpu")
    return torch.device(name)
