"""A contestant in a process of its own: the time of each epoch, the peak memory, the images it gets wrong."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rivals.outcome import Outcome, Point

_TICK = 0.5
"""Seconds between two looks at memory and at the metrics of a run."""


@dataclass(frozen=True)
class Watched:
    """What was seen of a command: its lines with the seconds at which they came, and its peaks of memory."""

    seconds: float
    peak_mb: float
    firm_mb: float
    lines: tuple[tuple[float, str], ...]


Plan = tuple[int, tuple[str, ...]]
"""Epochs of a rival's schedule, and the flags it is raced with."""


@dataclass(frozen=True)
class Rival:
    """A script of this folder, what it needs, and choices of flags, of which the fastest is raced."""

    name: str
    script: str
    python: str = sys.executable
    options: tuple[str, ...] = ()
    modes: tuple[tuple[str, ...], ...] = ((),)


@dataclass(frozen=True)
class OurRun:
    """A `holotype train`: its run folder and cache stay until the context that gave it ends."""

    watched: Watched
    points: tuple[Point, ...]
    folder: Path


def watch(command: Sequence[str], *, look: Callable[[float], None] = lambda _: None) -> Watched:
    """Run a command to its end, or exit where it fails; `look` gets the seconds gone, twice a second."""
    lines: list[tuple[float, str]] = []
    peak = firm = 0.0
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:

            def listen() -> None:
                for line in process.stdout or ():
                    lines.append((time.perf_counter() - start, line.strip()))

            listener = threading.Thread(target=listen)
            listener.start()
            while process.poll() is None:
                total, anonymous = _memory_mb(process.pid)
                peak, firm = max(peak, total), max(firm, anonymous)
                look(time.perf_counter() - start)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_TICK)
            seconds = time.perf_counter() - start
            listener.join()
        look(seconds)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read()[-4000:]}")
    return Watched(seconds, peak, firm, tuple(lines))


def _memory_mb(pid: int) -> tuple[float, float]:
    """Memory of a process and of all below it, and what of it the system could not take back.

    Pages shared by forked workers count once (PSS). Those of mapped files, such as libraries and the pixel
    cache, are part of the first number only.
    """
    total = firm = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(pid)
        for process in (tree, *tree.children(recursive=True)):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
                size = {name: 1024 * int(kibibytes) / 1e6 for name, kibibytes, _ in map(str.split, lines)}
                total += size["Pss:"]
                firm += size["Pss_Anon:"] + size["Pss_Shmem:"]
    return total, firm


def race_rival(rival: Rival, data: Path, *, seed: int, minutes: float, plan: Plan | None) -> Outcome:
    """Run a rival as planned before, or else as a run of one epoch says will fill the time.

    Its time ends with its last epoch: what it makes of the other images is asked outside of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answer.json"
        script = Path(__file__).with_name(f"{rival.script}.py")
        command = [rival.python, "-W", "ignore", str(script), str(data)]
        command += ["--seed", str(seed), "--out", str(out), *rival.options]
        epochs, mode = plan or _plan(command, rival, seconds=60 * minutes)
        watched = watch([*command, *mode, "--epochs", str(epochs)])
        answer = json.loads(out.read_text())
    said = [(moment, line.split()) for moment, line in watched.lines if line.startswith("epoch ")]
    points = tuple(Point(moment, float(accuracy)) for moment, (_, accuracy) in said)
    return Outcome(
        rival.name, seed, minutes, epochs, mode, points[-1].seconds, watched.peak_mb, watched.firm_mb, points,
        answer["judged"], tuple(answer["wrong"]),
    )  # fmt: skip


def _plan(command: Sequence[str], rival: Rival, *, seconds: float) -> Plan:
    """How many epochs of the fastest mode fill the time, so that the schedule ends with it."""
    plans = []
    for mode in rival.modes:
        trial = watch([*command, *mode, "--epochs", "1"])
        marks = [moment for moment, line in trial.lines if line.startswith(("ready", "epoch "))]
        before, epoch = marks[-2], marks[-1] - marks[-2]
        plans.append((epoch, max(math.floor((seconds - before) / epoch), 1), mode))
    return min(plans)[1:]


@contextlib.contextmanager
def train_ours(
    data: Path, *, seed: int, settings: Sequence[str] = (), options: Sequence[str] = ()
) -> Iterator[OurRun]:
    """A whole `holotype train` with a cold cache, as a user types it; an epoch ends when it is recorded."""
    with tempfile.TemporaryDirectory() as folder, _cache(f"{folder}/cache"):
        run = Path(folder) / "run"
        points: list[Point] = []

        def look(moment: float) -> None:
            rows = rows_of(run / "metrics.csv")[len(points) :]
            points.extend(Point(moment, float(row["validation_accuracy"])) for row in rows)

        chosen = [word for setting in (f"fit.seed={seed}", *settings) for word in ("--set", setting)]
        command = [sys.executable, "-m", "holotype", "train", str(data), "--runs", folder, "--name", "run"]
        watched = watch([*command, *options, *chosen], look=look)
        yield OurRun(watched, tuple(points), run)


def our_outcome(run: OurRun, data: Path, *, splits: Sequence[str], seed: int, minutes: float) -> Outcome:
    """What a run of ours came to, scored as `holotype evaluate` scores."""
    from holotype.config import DataConfig
    from holotype.dataset import open_dataset
    from holotype.predictor import load
    from holotype.scoring import score

    predictor = load(run.folder / "best")
    dataset = open_dataset(data, spec=predictor.bundle.manifest.preprocess, config=DataConfig())
    judged, wrong = 0, []
    for split in dataset.splits:
        if split in splits:
            found = score(predictor, dataset, split=split)
            judged += len(found.labels)
            missed = found.predicted != found.labels
            wrong += [path for path, miss in zip(found.paths, missed, strict=True) if miss]
    seen = run.watched
    return Outcome(
        "ours", seed, minutes, len(fine_tuning(run)), (), seen.seconds, seen.peak_mb, seen.firm_mb,
        run.points, judged, tuple(sorted(wrong)),
    )  # fmt: skip


def fine_tuning(run: OurRun) -> list[dict[str, str]]:
    """The timings of its epochs after the head."""
    return [row for row in rows_of(run.folder / "timings.csv") if row["stage"] == "fine-tune"]


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV, none where there is no file."""
    if not file.exists():
        return []
    with file.open() as stream:
        return list(csv.DictReader(stream))


def write_weights(file: Path) -> None:
    """The packaged ImageNet weights of the default backbone under timm's names."""
    import torch

    from holotype.models import Architecture, pretrained, recipe_of

    name = "tf_efficientnet_lite0"
    recipe = recipe_of(name)
    architecture = Architecture(
        name=name, classes=1000, height=224, width=224, mean=recipe.mean, std=recipe.std
    )
    torch.save(pretrained(architecture)[0].network.state_dict(), file)


@contextlib.contextmanager
def _cache(folder: str) -> Iterator[None]:
    """Let this process and those it starts keep their pixel cache in `folder`."""
    before = os.environ.get("HOLOTYPE_CACHE")
    os.environ["HOLOTYPE_CACHE"] = folder
    try:
        yield
    finally:
        del os.environ["HOLOTYPE_CACHE"]
        if before is not None:
            os.environ["HOLOTYPE_CACHE"] = before
