"""How many images a process computes at once: as asked for, or as many as fit into memory.

On a GPU a step that does not fit raises an error, so sizes are tried. On a CPU the system kills the process
instead, so the need is foretold: where memory is ample, by a bound from what autograd keeps for the backward
pass; else from the peaks of real steps on a few images, taken by a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from holotype.config import FitConfig
from holotype.dataset import Shape
from holotype.errors import TrainingError
from holotype.fit.optimizer import build_optimizer
from holotype.fit.rehearsal import example, forward, rehearsal, step
from holotype.models import Architecture, Classifier, create
from holotype.progress import note

__all__ = [
    "available_memory",
    "keep_freed_memory",
    "naming_memory",
    "out_of_memory",
    "settle_micro_batch",
]

_SHARE = 0.8  # of the memory that is free; the rest is for what else comes and goes
_PROBES = (1, 2, 4, 8)
_SECONDS = 20.0  # after which no larger step is probed
_SMALLER = "lower data.size or fit.scale, or choose a smaller model (holotype models)"


def settle_micro_batch(
    classifier: Classifier,
    config: FitConfig,
    *,
    size: Shape,
    device: torch.device,
    processes: int = 1,
    available: int | None = None,
) -> int:
    """Images that each of `processes` computes at once; at most its share of the `fit.batch_size` of a step.

    With `fit.micro_batch` auto that share, or a half, a quarter, … of it: the most that fits into `available`
    bytes (by default what is free). The images of a step, and so what is learned, stay the same.
    `TrainingError` where not even one image fits. `size` is the largest that images will have.
    """
    share = -(-config.batch_size // processes)
    if config.micro_batch != "auto":
        if config.micro_batch > share:
            note(f"fit.micro_batch={config.micro_batch}: a process has no more than {share} images per step")
        return min(config.micro_batch, share)
    if device.type != "cpu":
        return _largest_by_trial(classifier, config, share, size=size, device=device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    room = _SHARE * (available_memory() if available is None else available) / here
    bound = _bound(classifier, config, size=size)
    if bound.fixed + share * bound.each <= room:
        return share
    if _beside(classifier) + bound.least > room:
        raise _too_large(classifier, size=size, room=f"{room / 1e9:.2f} GB of memory")
    need = _probe(classifier, config, size=size, room=room, bound=bound)
    for count in _halvings(share):
        if need(count) <= room:
            if count < share:
                note(f"{count} images at once instead of {share}: more do not fit into {room / 1e9:.2f} GB")
            return count
    raise _too_large(classifier, size=size, room=f"{room / 1e9:.2f} GB of memory")


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, or what its cgroups leave it."""
    rooms = _cgroup_rooms(Path("/proc/self/cgroup"), mount=Path("/sys/fs/cgroup"))
    return min([int(psutil.virtual_memory().available), *rooms])


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory is short, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def naming_memory(*, micro_batch: int | None = None) -> Iterator[None]:
    """Turn an error for lack of memory into one line that names the remedy.

    `micro_batch` images are computed at once where that is a setting; None elsewhere.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if micro_batch is None:
            raise TrainingError("out of memory", where="train", fix=_SMALLER) from error
        raise TrainingError(
            f"out of memory with {micro_batch} images at once",
            where="fit.micro_batch",
            fix=f"try --set fit.micro_batch={micro_batch // 2}" if micro_batch > 1 else _SMALLER,
        ) from error


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back and faulting it in again at every step.

    Activations of tens of megabytes are freed and allocated hundreds of times a second; by default each is
    a fresh map of zeroed pages. Measured: a training step takes 0.6 of the time.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, which has no such habit
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


@dataclass(frozen=True)
class _Bound:
    """A step on n images needs less than fixed + n * each bytes, and each image more than `least`."""

    fixed: float
    each: float
    least: float


@dataclass(frozen=True)
class _Need:
    """Bytes of a training step: measured on some counts of images, and from there on `each` per image."""

    peaks: dict[int, float]
    each: float

    def __call__(self, count: int) -> float:
        """What `count` images need; infinite where they, or fewer, did not fit."""
        measured = max(known for known in self.peaks if known <= count)
        return self.peaks[measured] + (count - measured) * self.each


def _bound(classifier: Classifier, config: FitConfig, *, size: Shape) -> _Bound:
    """From what autograd keeps of two and three images, and the largest output of a layer.

    Not of one: a batch norm that learns may have one value of it, and no variance.

    Beside what is kept, a pass holds a few such outputs at its widest place, and their gradients. The
    factors are measured; of parameters there are gradients and an optimizer's moments, and of all tensors
    the averaged, the best, and those of a checkpoint that is being written.
    """
    device = torch.device("cpu")
    with rehearsal(classifier, config, device=device) as model:
        kept, widest = zip(*(_kept(model, n, size=size, config=config) for n in (2, 3)), strict=True)
        each, width = kept[1] - kept[0], widest[1] - widest[0]
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return _Bound(
        fixed=max(kept[0] - 2 * each, 0) + 8 * trained + _beside(classifier),
        each=1.3 * each + 5 * width + _pictures(size),
        least=each + 2 * width + _pictures(size),
    )


def _kept(model: Classifier, count: int, *, size: Shape, config: FitConfig) -> tuple[int, int]:
    """Bytes kept for the backward pass of `count` images, and of the largest output of a layer."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}
    outputs: list[int] = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    def look(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.nbytes)

    # A norm that is watched would be computed apart from its convolution.
    watched = [m for m in model.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [module.register_forward_hook(look) for module in watched]
    images = example(count, size=size, device=torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(model, images, precision=str(config.precision))
    for handle in handles:
        handle.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), max(outputs)


def _beside(classifier: Classifier) -> int:
    """Bytes of the averaged weights, the best, and two copies of all for a checkpoint."""
    return 4 * sum(int(tensor.nbytes) for tensor in classifier.state_dict().values())


def _pictures(size: Shape) -> int:
    """Bytes of an image on its way: a larger view, its float copies while it is augmented, the input."""
    return 16 * 4 * size.height * size.width


def _halvings(share: int) -> list[int]:
    """`share`, and what is left of it when it is cut into 2, 4, 8, … parts, rounded up."""
    counts = [share]
    while counts[-1] > 1:
        counts.append(-(-counts[-1] // 2))
    return counts


def _probe(classifier: Classifier, config: FitConfig, *, size: Shape, room: float, bound: _Bound) -> _Need:
    """Take real steps on 1, 2, 4, … images in another process, which the system may kill in our stead."""
    beside = _beside(classifier)
    task = {
        "architecture": classifier.architecture.model_dump(mode="json"),
        "fresh": sorted(classifier.fresh),
        "config": config.model_dump(mode="json"),
        "size": [size.height, size.width],
        "room": room - beside,
        "each": bound.least,
    }
    command = (sys.executable, "-c", "from holotype.fit.memory import _take_probes; _take_probes()")
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode > 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
        raise TrainingError(
            f"the memory of a training step could not be measured ({reason[0]})",
            where="fit.micro_batch",
            fix="give it a number: --set fit.micro_batch=8",
        )
    peaks: dict[int, float] = {}
    for line in done.stdout.splitlines():
        count, *peak = line.split()
        # A step that was begun and never ended did not fit.
        peaks[int(count)] = float(peak[0]) + beside + int(count) * _pictures(size) if peak else math.inf
    slopes = [
        (peaks[large] - peaks[small]) / (large - small)
        for small, large in pairwise(peaks)
        if peaks[large] < math.inf
    ]
    return _Need({1: math.inf} | peaks, max(bound.least, *slopes[-1:]))


def _take_probes() -> None:
    """In the process of its own: read the task, print the count before each step, and with its peak after."""
    task = json.load(sys.stdin)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if the system has to kill, then this process
    keep_freed_memory()
    config, device = FitConfig(**task["config"]), torch.device("cpu")
    classifier = create(Architecture(**task["architecture"]))
    classifier.fresh = frozenset(task["fresh"])
    with rehearsal(classifier, config, device=device) as model:
        optimizer = build_optimizer(model, config)
        base, needed, done, begun = psutil.Process().memory_info().rss, 0.0, 0, time.monotonic()
        for count in _PROBES:
            if needed + (count - done) * task["each"] > task["room"] or time.monotonic() - begun > _SECONDS:
                return
            _say(count)
            images = example(count, size=Shape(*task["size"]), device=device)
            try:
                step(model, images, precision=config.precision)
                optimizer.step()
            except (MemoryError, RuntimeError) as error:
                if out_of_memory(error):
                    return
                raise
            except ValueError:
                if count > 1:
                    raise
                continue  # a batch norm with one value and no variance: nobody trains on one image so
            optimizer.zero_grad()
            needed, done = _peak() - base, count
            _say(count, needed)


def _say(*numbers: float) -> None:
    sys.stdout.write(" ".join(map(str, numbers)) + "\n")
    sys.stdout.flush()


def _peak() -> int:
    """The most bytes of memory that this process has ever had."""
    if sys.platform == "linux":
        # getrusage would also count what the parent had when it forked.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _largest_by_trial(
    classifier: Classifier, config: FitConfig, share: int, *, size: Shape, device: torch.device
) -> int:
    """On a GPU: the first of `share`, its half, its quarter, … with which a step raises no error."""
    from accelerate.utils import find_executable_batch_size

    counts = iter([*_halvings(share)[1:], 0])

    def attempt(batch_size: int) -> int:
        with rehearsal(classifier, config, device=device) as model:
            optimizer = build_optimizer(model, config)
            for _ in range(2):  # the second with the optimizer's moments in memory
                images = example(batch_size, size=size, device=device)
                step(model, images, precision=str(config.precision))
                optimizer.step()
        return batch_size

    try:
        trial = find_executable_batch_size(attempt, share, lambda: next(counts))
        count: int = trial()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise _too_large(classifier, size=size, room="the memory of the GPU") from error
    if count < share:
        note(f"{count} images at once instead of {share}: more do not fit into the memory of the GPU")
    return count


def _too_large(classifier: Classifier, *, size: Shape, room: str) -> TrainingError:
    return TrainingError(
        f"a training step on one image of {size.height}x{size.width} pixels does not fit into {room}",
        where=classifier.architecture.name,
        fix=_SMALLER,
    )


def _cgroup_rooms(own: Path, *, mount: Path) -> Iterator[int]:
    """What the memory limits of this process's control groups, v1 or v2, leave it: one number per limit.

    Pages of files that nobody used lately are counted as free: the system drops them before it kills.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # no such thing on this system
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be one that only the host sees; the root is then the container's own.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root or root in folder.parents:
                yield from _room(folder, *names)


def _room(folder: Path, limit: str, usage: str, idle: str) -> Iterator[int]:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return  # no limit here, or "max"
    yield max(most - used + int(statistics.get(idle, 0)), 0)
