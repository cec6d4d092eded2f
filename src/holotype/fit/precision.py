"""In which arithmetic a run trains: as asked for, or as a measured step says; remembered per machine."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from holotype.bundle import write_text
from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.errors import ConfigError
from holotype.fit.rehearsal import example, rehearsal, step
from holotype.machine import cache_root
from holotype.models import Classifier
from holotype.progress import note

__all__ = ["Precision", "choose_compile", "choose_precision"]

Precision = Literal["fp32", "bf16", "fp16"]

_SECONDS = 0.5  # after which no further round is begun
_ROUNDS = 5
_BATCH = 8  # what pays at 32 pays at 8; at 1 bf16 does not, as it casts the weights at every step


def choose_precision(
    classifier: Classifier, config: FitConfig, *, size: Shape, device: torch.device
) -> Precision:
    """What was asked for, or the fastest in a training step on images of `size`, measured once per machine.

    A CPU without bf16 instructions emulates them at a tenth of the speed and is not measured.
    """
    if config.precision != "auto":
        if config.precision == "fp16" and device.type == "cpu":
            raise ConfigError("fp16 training needs a GPU", where="fit.precision", fix="use bf16 or fp32")
        return config.precision
    half = _half(device)
    if config.deterministic or half is None:
        return "fp32"

    def measure() -> dict[str, float]:
        with _one_thread(device), rehearsal(classifier, config, device=device) as model:
            names: tuple[str, ...] = ("fp32", half)
            runners = {name: _runner(model, size, device=device, precision=name) for name in names}
            return _race(runners, count=_affordable(runners["fp32"]))

    question = _question("precision", classifier, config, size=size, device=device, half=half)
    return cast("Precision", _fastest(question, measure))


def choose_compile(
    classifier: Classifier, config: FitConfig, *, size: Shape, device: torch.device, precision: Precision
) -> bool:
    """Whether to compile: as asked for, or on a GPU where a step is faster so; never by itself on a CPU.

    `ConfigError` where it is asked for and this machine cannot. Compile with `classifier.compile()`, which
    works in place: tensors keep their names.
    """
    if config.compile is True:
        _check_compiler(device)
        return True
    if config.compile is False or device.type != "cuda":
        return False

    def measure() -> dict[str, float]:
        with rehearsal(classifier, config, device=device) as model:
            run = _runner(model, size, device=device, precision=precision)
            seconds = _race({"no": run}, count=_BATCH)
            try:
                _check_compiler(device)
            except ConfigError as error:
                note(f"not compiled: {error.what}")
                return seconds
            model.compile()
            return seconds | _race({"yes": run}, count=_BATCH)

    question = _question("compile", classifier, config, size=size, device=device, precision=precision)
    return _fastest(question, measure) == "yes"


def _half(device: torch.device) -> Precision | None:
    """The half precision that `device` computes in itself."""
    if device.type == "mps":
        return "fp16"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities()
    return "bf16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16")) else None


def _runner(
    model: Classifier, size: Shape, *, device: torch.device, precision: str
) -> Callable[[int], float]:
    """A function that takes a step on so many images and returns its seconds; on a CPU, those of the CPU."""
    images = example(_BATCH, size=size, device=device)
    clock = time.thread_time if device.type == "cpu" else time.perf_counter

    def run(count: int) -> float:
        model.zero_grad()
        start = clock()
        step(model, images[:count], precision=precision)
        return clock() - start

    return run


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, one thread: several wait for each other, and tell nothing where they have neighbours."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _affordable(run: Callable[[int], float]) -> int:
    """On how many images to measure: a network that is slow here is measured on few.

    Never on one: a batch norm that learns may have one value of it, and no variance.
    """
    run(2)
    return min(max(int(2 / run(2)), 2), _BATCH)


def _race(runners: dict[str, Callable[[int], float]], *, count: int) -> dict[str, float]:
    """Seconds per image of each: the best of a few rounds in turn."""
    for run in runners.values():
        run(count)  # builds the kernels
    best = dict.fromkeys(runners, math.inf)
    begun = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, run in runners.items():
            best[name] = min(best[name], run(count) / count)
        if time.perf_counter() - begun > _SECONDS:
            break
    return best


def _question(
    kind: str, classifier: Classifier, config: FitConfig, *, size: Shape, device: torch.device, **more: str
) -> dict[str, Any]:
    """All that the answer depends on."""
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else str(torch.cpu.get_capabilities().get("cpu_name"))
    )
    freezing = {"freeze", "unfreeze", "freeze_norm", "gradual", "epochs"}
    return {
        "kind": kind,
        "device": f"{device.type}: {machine}",
        "torch": torch.__version__,
        "architecture": classifier.architecture.model_dump(mode="json", exclude={"mean", "std", "classes"}),
        "size": [size.height, size.width],
        **config.model_dump(mode="json", include=freezing),
        **more,
    }


def _fastest(question: dict[str, Any], measure: Callable[[], dict[str, float]]) -> str:
    """The fastest answer, from the cache folder where the same question was measured before."""
    token = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_root() / "measured" / f"{question['kind']}-{token}.json"
    seconds = _remembered(file, question)
    if seconds is None:
        seconds = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"question": question, "seconds_per_image": seconds}, indent=1))
        told = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in seconds.items())
        note(f"{question['kind']}: {told} ms per image of a training step")
    return min(seconds, key=lambda name: seconds[name])


def _remembered(file: Path, question: dict[str, Any]) -> dict[str, float] | None:
    try:
        content = json.loads(file.read_text())
        seconds: dict[str, float] = content["seconds_per_image"]
        return seconds if content["question"] == question and min(seconds.values()) > 0 else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # not measured yet, or by something else: measuring again costs a second


def _check_compiler(device: torch.device) -> None:
    """Compile something small, as nothing else tells whether compiler, headers and triton are all there."""
    module = nn.Linear(2, 2).to(device)
    module.compile()
    try:
        module(torch.ones(1, 2, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"torch.compile does not work on this machine ({reason[0]})",
            where="fit.compile=true",
            fix="install a C++ compiler (on a GPU also triton), or set fit.compile to auto",
        ) from error
