"""Checkpoints of a training run: written so that a kill at any moment leaves a whole one.

A checkpoint is one safetensors file whose metadata holds the rest as JSON. The SHA-256 of its content is part
of its name, so one rename makes the content, its hash and its place in the order valid together.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from holotype.bundle import hash_file, sync
from holotype.errors import TrainingError
from holotype.progress import note

__all__ = ["Checkpoint", "load_checkpoint", "pack_optimizer", "save_checkpoint", "unpack_optimizer"]

Tensors = dict[str, torch.Tensor]

_HASH_LENGTH = 16
_KEPT = 2  # the newest, and the one before it in case the newest is damaged


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and whatever JSON can hold; floats come back exactly, tuples as lists."""

    tensors: Tensors
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the next checkpoint of `folder` and remove all but the one before it; returns its file.

    Temporary file in the same folder → fsync → rename → fsync of the folder. One process writes to a folder.
    `TrainingError` where the disk is full or cannot be written; the checkpoints that were there stay valid.
    """
    scratch = folder / ".checkpoint.part"
    tensors = _apart(checkpoint.tensors)
    content = json.dumps(checkpoint.state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        older = _generations(folder)
        save_file(tensors, scratch, metadata={"state": content})
        sync(scratch)
        number = 1 + max((number for number, _ in older), default=0)
        file = folder / f"checkpoint-{number:06d}-{hash_file(scratch)[:_HASH_LENGTH]}.safetensors"
        scratch.replace(file)
        sync(folder)
        for _, stale in older[_KEPT - 1 :]:
            stale.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        megabytes = (sum(tensor.nbytes for tensor in tensors.values()) + len(content)) / 1e6
        raise TrainingError(
            f"the checkpoint could not be written ({error})",
            where=folder,
            fix=f"make room for {megabytes:.1f} MB and see that it can be written, then use --resume:"
            " what was saved before is whole",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    return file


def load_checkpoint(folder: Path) -> Checkpoint:
    """The newest whole checkpoint of `folder`; one that is damaged is named and set aside.

    `TrainingError` where none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for _, file in _generations(folder):
        try:
            checkpoint = _read(file)
        except (OSError, SafetensorError, ValueError, LookupError) as error:
            damaged.append((file, str(error)))
            continue
        for broken, reason in damaged:
            # Out of the order, or the next save would take it for the one to fall back on.
            with contextlib.suppress(OSError):
                broken.rename(broken.with_suffix(".damaged"))
            note(f"{broken} is damaged ({reason}): going on from the one before it, {file.name}")
        return checkpoint
    if not damaged:
        raise TrainingError("holds no checkpoint", where=folder, fix="start again without --resume")
    reasons = "; ".join(f"{file.name}: {reason}" for file, reason in damaged)
    raise TrainingError(
        f"every checkpoint is damaged ({reasons})", where=folder, fix="start again without --resume"
    )


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, Any]:
    """The whole state of any torch or timm optimizer, as tensors by name and what JSON can hold."""
    tensors: Tensors = {}
    return tensors, _pack(optimizer.state_dict(), name="", tensors=tensors)


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], state: Any
) -> None:
    """Put the state from `pack_optimizer` back, bit by bit; `TrainingError` where it is of another one."""
    saved = _unpack(state, tensors=tensors)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise TrainingError(
            f"the checkpoint is of another optimizer ({error})",
            where="fit.optimizer",
            fix="resume with the settings of the run's config.yaml",
        ) from error
    # load_state_dict casts to the parameters' type, so what it cast is put back. The order in memory is the
    # parameters', as it was: vectorised and scalar code may round differently.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = optimizer.state_dict()["state"]
    for number, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                states[number][name] = _like(parameters[number], value, states[number][name].device)


def _like(parameter: torch.Tensor, value: torch.Tensor, device: torch.device) -> torch.Tensor:
    if value.shape != parameter.shape:
        return value.to(device)
    return torch.empty_like(parameter, dtype=value.dtype, device=device).copy_(value)


def _apart(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Contiguous, on the CPU, and no two in the same memory, as safetensors asks for."""
    result: Tensors = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        result[name] = own.clone() if place in places else own
        places.add(place)
    return result


def _generations(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by their number, the newest first."""
    found = []
    for file in folder.glob("checkpoint-*-*.safetensors"):
        number = file.name.split("-")[1]
        if number.isdecimal():
            found.append((int(number), file))
    return sorted(found, reverse=True)


def _read(file: Path) -> Checkpoint:
    digest = hash_file(file)[:_HASH_LENGTH]
    if digest != file.stem.split("-")[2]:
        raise ValueError(f"its content has the hash {digest}")
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return Checkpoint(tensors, json.loads(opened.metadata()["state"]))


def _pack(value: Any, *, name: str, tensors: Tensors) -> Any:
    """`value` with every tensor moved to `tensors`, and dicts (keys of any kind) and tuples spelt out."""

    def inner(part: Any, key: object) -> Any:
        return _pack(part, name=f"{name}.{key}" if name else str(key), tensors=tensors)

    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, inner(part, key)] for key, part in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [inner(part, key) for key, part in enumerate(value)]}
    if isinstance(value, list):
        return [inner(part, key) for key, part in enumerate(value)]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TrainingError(
        f"the optimizer's {name} is a {type(value).__name__}, which no checkpoint can hold",
        where="fit.optimizer",
        fix="use another optimizer, such as adamw",
    )


def _unpack(value: Any, *, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(part, tensors=tensors) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tuple":
        return tuple(_unpack(part, tensors=tensors) for part in content)
    return {key: _unpack(part, tensors=tensors) for key, part in content}
