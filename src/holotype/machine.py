"""This machine: where the user's cache is, what its processor is called, how many cores are ours."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["available_cores", "cache_root", "machine_name"]


def available_cores() -> int:
    """Cores this process may use (affinity and container masks included where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_root() -> Path:
    """HOLOTYPE_CACHE, or `holotype` in the user's cache folder."""
    own = os.environ.get("HOLOTYPE_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "holotype"


def machine_name() -> str:
    """What a measured speed belongs to: host, processor and the cores that this process may use."""
    return f"{platform.node()}, {_processor()}, {available_cores()} cores"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        # Two virtual processors of one name may differ in what they can.
        able = [
            name for name in ("avx2", "avx512_vnni", "amx_int8", "amx_bf16") if name in found.get("flags", "")
        ]
        return " ".join([found.get("model name", platform.machine()), *able])
    except OSError:
        return platform.processor() or platform.machine()
