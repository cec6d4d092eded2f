"""Which runtime is the fastest for a bundle on this machine: measured once, and remembered."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holotype.bundle import Bundle, PayloadName, library_versions, write_text
from holotype.errors import BundleError
from holotype.machine import cache_root, machine_name
from holotype.runtime.contract import NAMES, PRECISIONS, Precision, RuntimeName

__all__ = ["Choice", "default_choice", "remember", "remembered", "served_bytes", "served_files"]


@dataclass(frozen=True)
class Choice:
    """A runtime, the arithmetic of what is not in integers, and how many threads; None: all cores."""

    runtime: RuntimeName
    precision: Precision
    threads: int | None = None


def default_choice(bundle: Bundle) -> Choice:
    """What runs a bundle that nobody measured here: onnxruntime, then OpenVINO, then torch."""
    precision: Precision = "bf16" if bundle.manifest.precision == "bf16" else "fp32"
    payloads = bundle.manifest.payloads
    if "onnx" in payloads and precision == "fp32":
        return Choice("onnxruntime", precision)
    if "tensorrt" in payloads and not set(payloads) & {"onnx", "openvino", "weights"}:
        return Choice("tensorrt", "fp32")
    return Choice("openvino" if "openvino" in payloads or "onnx" in payloads else "torch", precision)


def served_files(bundle: Bundle, runtime: RuntimeName) -> list[Path]:
    """The files that a runtime loads of a bundle; `BundleError` where it has none for it."""
    payloads = bundle.manifest.payloads
    wanted: dict[str, tuple[PayloadName, ...]] = {
        "torch": ("weights", "architecture"),
        "openvino": ("openvino", "openvino_weights") if "openvino" in payloads else ("onnx",),
        "tensorrt": ("tensorrt",),
    }
    names = wanted.get(runtime, ("onnx",))
    lacking = [name for name in names if name not in payloads]
    if lacking:
        raise BundleError(f"has no {lacking[0]} that {runtime} could load", where=bundle.path)
    return [bundle.path / payloads[name].path for name in names]


def served_bytes(bundle: Bundle, runtime: RuntimeName) -> int:
    """Size of `served_files`."""
    return sum(file.stat().st_size for file in served_files(bundle, runtime))


def remembered(bundle: Bundle) -> Choice | None:
    """What was measured for this bundle on this machine with these libraries; None: nothing."""
    try:
        content = json.loads(_file(bundle).read_text())
        found = Choice(**content["choice"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    known = content.get("question") == _question(bundle)
    return found if known and found.runtime in NAMES and found.precision in PRECISIONS else None


def remember(bundle: Bundle, choice: Choice) -> None:
    """Keep a choice for every later start on this machine."""
    file = _file(bundle)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"question": _question(bundle), "choice": asdict(choice)}, indent=1))


def _file(bundle: Bundle) -> Path:
    # Machines may share the cache's folder: each keeps what it measured.
    machine = hashlib.sha256(machine_name().encode()).hexdigest()[:8]
    return cache_root() / "measured" / f"runtime-{bundle.hash[:16]}-{machine}.json"


def _question(bundle: Bundle) -> dict[str, Any]:
    libraries = ("onnxruntime", "openvino", "torch")
    versions = {name: version for name, version in library_versions().items() if name in libraries}
    return {"bundle": bundle.hash, "machine": machine_name(), "versions": versions}
