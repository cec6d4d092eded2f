"""Runtimes: the same bundle through torch, onnxruntime, OpenVINO or TensorRT behind one protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from holotype.bundle import Bundle
from holotype.errors import ConfigError
from holotype.machine import available_cores
from holotype.runtime.choice import Choice, default_choice, remember, remembered, served_bytes, served_files
from holotype.runtime.contract import NAMES, PRECISIONS, Outputs, Precision, Runtime, RuntimeName
from holotype.runtime.golden import verify_golden
from holotype.runtime.onnx_runtime import load_onnx, load_onnx_model, open_onnx, refuse_external_data
from holotype.runtime.openvino_runtime import load_openvino, open_openvino
from holotype.runtime.tensorrt_runtime import has_tensorrt, load_tensorrt, open_tensorrt
from holotype.runtime.torch_runtime import open_torch, torch_runtime

__all__ = [
    "NAMES",
    "PRECISIONS",
    "Choice",
    "Outputs",
    "Precision",
    "Runtime",
    "RuntimeName",
    "choose",
    "default_choice",
    "has_tensorrt",
    "load_onnx",
    "load_onnx_model",
    "load_openvino",
    "load_tensorrt",
    "open_runtime",
    "refuse_external_data",
    "remember",
    "remembered",
    "served_bytes",
    "served_files",
    "torch_runtime",
    "verify_golden",
]


def choose(
    bundle: Bundle,
    *,
    name: RuntimeName = "auto",
    precision: Precision = "auto",
    threads: int | None = None,
) -> Choice:
    """Fill in what is "auto": the choice measured here, or else the default one.

    A bundle that was accepted in fp32 runs in fp32 unless bf16 is asked for by name.
    """
    measured = remembered(bundle)
    best = measured if measured is not None and name in ("auto", measured.runtime) else default_choice(bundle)
    if name not in ("auto", best.runtime):
        best = Choice(name, default_choice(bundle).precision)
    return Choice(
        best.runtime,
        best.precision if precision == "auto" else precision,
        threads or best.threads,
    )


def open_runtime(
    bundle: Bundle,
    *,
    name: RuntimeName = "auto",
    precision: Precision = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> Runtime:
    """Open `bundle` in a runtime; "auto" takes the one that `choose` says.

    `device` concerns torch and TensorRT: any other than "auto" and "cpu" is a `ConfigError` for the others,
    which run on the CPU. `threads` defaults to every core this process may use.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown runtime {name!r}", fix=f"choose one of: {', '.join(NAMES)}")
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}", fix=f"choose one of: {', '.join(PRECISIONS)}")
    choice = choose(bundle, name=name, precision=precision, threads=threads)
    if choice.runtime in ("onnxruntime", "openvino") and device not in ("auto", "cpu"):
        raise ConfigError(
            f"{choice.runtime} runs on the CPU here", where=f"--device {device}", fix="add --runtime torch"
        )
    half, count = choice.precision == "bf16", choice.threads or available_cores()
    if choice.runtime in ("onnxruntime", "tensorrt") and half:
        raise ConfigError(
            "onnxruntime has no bf16 on CPUs"
            if choice.runtime == "onnxruntime"
            else "tensorrt computes in the precision that it was exported in",
            where="--precision bf16",
            fix="add --runtime openvino or --runtime torch",
        )
    open_one: dict[str, Callable[[], Runtime]] = {
        "onnxruntime": lambda: open_onnx(bundle, threads=count),
        "openvino": lambda: open_openvino(bundle, threads=count, half=half),
        "tensorrt": lambda: open_tensorrt(bundle, device=device),
        "torch": lambda: open_torch(bundle, device=device, half=half, threads=threads),
    }
    return open_one[cast("str", choice.runtime)]()
