"""The folder of a run: begun, gone on with after an end of any kind, and worked on by one process alone."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from holotype.bundle import write_bytes, write_text
from holotype.config import (
    WITHOUT_EFFECT_ON_RESULTS,
    TrainConfig,
    merge,
    read_recipe,
    resolve_config,
    to_yaml,
)
from holotype.errors import ConfigError, DatasetError, TrainingError
from holotype.fit.checkpoint import Checkpoint, load_checkpoint
from holotype.fit.interrupt import terminable
from holotype.fit.session import Session, open_session
from holotype.locks import lone
from holotype.parity import check_enough
from holotype.progress import note
from holotype.runlog import Row, RunLog, create_run

__all__ = ["Run", "alone", "begin_run", "record_end", "resume_run"]

_RUN, _TABLE, _FOCUS = "run.json", "images.parquet", "focus.csv"


@dataclass(frozen=True)
class Run:
    """A session with its folder, its log, and the checkpoint that it goes on from."""

    session: Session
    folder: Path
    log: RunLog
    checkpoint: Checkpoint | None


def begin_run(data: Path, config: TrainConfig, *, name: str, runs: Path, device: str) -> Run:
    """A run in a new folder, which holds all that resuming it takes."""
    start = time.perf_counter()
    config = _located(config)
    session = open_session(data, config, device=device)
    read: Row = {"stage": "read", "seconds": time.perf_counter() - start}
    _tell(session)
    check_enough(len(session.dataset.table))
    processes = session.processes
    folder = processes.from_first(create_run(runs, name) if processes.first else Path())
    session = replace(session, folder=folder)
    if processes.first:
        write_text(folder / "config.yaml", to_yaml(session.config))
        (folder / "last").mkdir()
        _remember(folder, session)
        _record(
            folder,
            {
                "data": str(data.resolve()),
                "device": session.device.type,
                "root_hash": session.dataset.root_hash,
                "finished": False,
            },
        )
    fit, spec = session.config.fit, session.spec
    note(
        f"{session.architecture.name} ({session.origin} weights), {spec}, {fit.precision} on {session.device}"
        f" → {folder}"
    )
    log = RunLog(folder if processes.first else None)
    log.add_timing(read)
    return Run(session, folder, log, None)


def _located(config: TrainConfig) -> TrainConfig:
    """With absolute paths of the files that settings name: a run may be resumed from another folder."""
    changed: dict[str, dict[str, str]] = {}
    for section, name in (("fit", "focus"), ("distill", "teacher"), ("model", "weights"), ("data", "images")):
        value = getattr(getattr(config, section), name)
        word = section == "model" and value in ("auto", "none")  # whatever files there are of that name
        if value is not None and not word and Path(value).exists():
            changed.setdefault(section, {})[name] = str(Path(value).resolve())
    sections = {key: getattr(config, key).model_copy(update=value) for key, value in changed.items()}
    return config.model_copy(update=sections)


def _continued(config: TrainConfig, overrides: Mapping[str, Any], *, folder: Path) -> TrainConfig:
    """The settings of a run with `overrides`; `ConfigError` where its result would depend on them."""
    # As one recipe: that a preset could do nothing on top of them is no news here.
    changed = resolve_config(TrainConfig, recipe=merge(config.model_dump(mode="json"), overrides))
    before, after = (each.model_dump(exclude=WITHOUT_EFFECT_ON_RESULTS) for each in (config, changed))
    if before != after:
        raise ConfigError(
            "a resumed run keeps its settings",
            where=folder,
            fix="change nothing but fit.micro_batch, fit.checkpoint_seconds, data.max_unreadable,"
            " data.cache_limit_gb, data.max_unpacked_gb and monitor",
        )
    return changed


def resume_run(
    folder: Path, *, data: Path | str | None, device: str | None, overrides: Mapping[str, Any]
) -> Run:
    """A run from its last checkpoint, or from its start where it was killed before the first one."""
    try:
        recorded = json.loads((folder / "last" / _RUN).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("is not a run that can be resumed", where=folder, fix="check --resume") from error
    config = resolve_config(TrainConfig, recipe=read_recipe(folder / "config.yaml"))
    config = _continued(config, overrides, folder=folder)
    if recorded["finished"]:
        raise ConfigError("is finished: there is nothing to resume", where=folder, fix="train anew")
    # A run that was killed before its first checkpoint begins anew.
    checkpoint = load_checkpoint(folder / "last") if any((folder / "last").glob("checkpoint-*")) else None
    source = Path(data) if data is not None else Path(recorded["data"])
    session = open_session(
        source,
        config,
        device=device or recorded["device"],
        folder=folder,
        before=_began_with(folder),
        focus=_focused_on(folder),
    )
    if session.dataset.root_hash != recorded["root_hash"]:
        unreadable = session.dataset.unreadable
        hint = f" ({unreadable[0].path} cannot be read: {unreadable[0].error})" if unreadable else ""
        raise DatasetError(
            f"is not what it was when the run began: files, labels or splits have changed{hint}",
            where=source,
            fix="put it back as it was, or train anew",
        )
    at = checkpoint.state if checkpoint is not None else {"epoch": 0, "step": 0}
    note(f"resuming {folder} after step {at['step']} of epoch {at['epoch']}")
    rows = {"metrics": [], "timings": []} if checkpoint is None else checkpoint.state
    if session.processes.first:
        with lone(folder / "last") as free:  # its tables are written again from here on
            _check_free(free, folder)
    log = RunLog.resume(
        folder if session.processes.first else None, metrics=rows["metrics"], timings=rows["timings"]
    )
    return Run(session, folder, log, checkpoint)


def _remember(folder: Path, session: Session) -> None:
    """What images the run began with, and which of them it is to show more often.

    Some may not be readable when it is resumed, and the list may be another one by then, or gone.
    """
    focus = session.config.fit.focus
    if focus is not None:
        write_bytes(folder / "last" / _FOCUS, Path(focus).read_bytes())
    buffer = io.BytesIO()
    session.dataset.table.write_parquet(buffer)
    write_bytes(folder / "last" / _TABLE, buffer.getvalue())


def _began_with(folder: Path) -> pl.DataFrame | None:
    """The images that a run began with; None where it was begun by a version that did not remember them."""
    try:
        return pl.read_parquet(folder / "last" / _TABLE)
    except (OSError, pl.exceptions.PolarsError):
        return None


def _focused_on(folder: Path) -> Path | None:
    """The list of images that a run began with; None without one, or of a version that did not keep it."""
    kept = folder / "last" / _FOCUS
    return kept if kept.is_file() else None


def _record(folder: Path, content: Mapping[str, Any]) -> None:
    """What a run that is resumed must know beside its settings and its checkpoint."""
    write_text(folder / "last" / _RUN, json.dumps(content, indent=1))


def _tell(session: Session) -> None:
    dataset = session.dataset
    sizes = ", ".join(f"{len(dataset.rows(split)):,} {split}" for split in dataset.splits)
    note(f"{len(dataset.table):,} images in {len(dataset.classes)} classes: {sizes}")
    if dataset.deviation:
        label, gap = max(dataset.deviation.items(), key=lambda item: item[1])
        note(f"automatic split; the class furthest from the wanted shares is {label}, by {gap:.1%}")
    if dataset.ignored:
        note(
            f"passed over {len(dataset.ignored)} files or folders without images, first {dataset.ignored[0]}"
        )


def record_end(folder: Path, *, finished: bool) -> None:
    """Note whether there is anything left to resume."""
    recorded = json.loads((folder / "last" / _RUN).read_text())
    _record(folder, {**recorded, "finished": finished})


def _check_free(free: bool, folder: Path) -> None:
    if not free:
        raise ConfigError("is being trained by another process", where=folder, fix="wait for it")


@contextmanager
def alone(run: Run) -> Iterator[Path]:
    """A folder for what is not finished yet, in a run that no other process of this machine works on."""
    with ExitStack() as stack:
        first, inside = run.session.processes.first, None
        if first:
            _check_free(stack.enter_context(lone(run.folder / "last")), run.folder)
            inside = run.folder
            for left in run.folder.glob(".work-*"):
                shutil.rmtree(left, ignore_errors=True)  # by a run that was killed
        try:
            with terminable():
                yield Path(stack.enter_context(tempfile.TemporaryDirectory(dir=inside, prefix=".work-")))
        except KeyboardInterrupt as error:
            if run.session.processes.count > 1:
                # By a launcher too, when another process has died; and only errors are said by all of them.
                raise TrainingError(
                    f"process {run.session.processes.rank} of {run.session.processes.count} was told to stop",
                    fix="if another one died, look at its last message; go on with: holotype train"
                    f" --resume {run.folder}",
                ) from error
            note(f"go on with: holotype train --resume {run.folder}")
            raise
