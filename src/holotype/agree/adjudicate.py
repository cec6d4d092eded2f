"""`holotype agree adjudicate`: one queue of all that somebody has to decide, as a page and as files."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holotype.agree.apply import read_labels
from holotype.agree.exchange import nearest, write_queue
from holotype.agree.relabel import Desk, serve_page
from holotype.config import AgreeConfig
from holotype.dataset.revisions import note_outdated
from holotype.dataset.store import cache_folder
from holotype.errors import DatasetError
from holotype.preprocess import Limits
from holotype.progress import note
from holotype.review import build_queue, read_decisions, read_log, read_sample, read_suspects

__all__ = ["Adjudicated", "adjudicate", "disagreements"]


@dataclass(frozen=True)
class Adjudicated:
    """How far the queue is: `items` in all, of them `decided` and `skipped`; the rest is open."""

    items: int
    decided: int
    skipped: int
    out: Path | None = None


def adjudicate(
    data: Path | str,
    *,
    votes: Sequence[Path] = (),
    plan: Path | None = None,
    out: Path | None = None,
    config: AgreeConfig | None = None,
    port: int | None = 8001,
    open_browser: bool = True,
    new_classes: Sequence[str] = (),
) -> Adjudicated:
    """Ask about the audit's review sample and suspects, and about images whose `votes` differ; blocks.

    The page is served on 127.0.0.1 until all is decided, or Ctrl-C; `port` None: no page. `out` is a folder
    for the queue as files for other tools. Answers are kept in the dataset's cache folder at once; nothing is
    changed in the dataset before `apply`. `DatasetError` where there is nothing to ask about.
    """
    config = config or AgreeConfig()
    data = Path(data)
    folder = cache_folder(data)
    labels = read_labels(data, config=config)
    classes = tuple(sorted({*labels.classes, *new_classes}))
    by_path = labels.by_path
    sample, suspects = read_sample(folder), read_suspects(folder)
    if sample is None and suspects is None and not votes:
        raise DatasetError(
            "there is nothing to decide about",
            where=data,
            fix="run holotype audit DATA --review-sample 300 first, or give annotators' files: --votes FILE",
        )
    disputed = disagreements(votes, by_path, plan=plan) if votes else {}
    _check_classes(disputed, classes, where=data)
    items = build_queue(by_path, sample=sample, disagreements=disputed, suspects=suspects)
    limits = Limits(max_pixels=config.data.max_pixels)
    root = labels.own.root
    note_outdated(f"revision {labels.revision}", labels.outdated)
    note_outdated("decisions", read_log(folder, root=root).outdated)
    if out is not None:
        write_queue(out, items, root=root, classes=classes, limits=limits)
    if not items:
        note("there is nothing to decide about: no sample, no suspects and no disagreement")
    elif port is not None:
        command = _apply_command(data, config=config, new_classes=new_classes)
        desk = Desk(folder, root, items, classes, command, limits)
        serve_page(desk, port=port, open_browser=open_browser)
    decisions = read_decisions(folder, root=root)
    actions = Counter(decisions[item.path].action for item in items if item.path in decisions)
    return Adjudicated(len(items), actions["label"] + actions["drop"], actions["skip"], out)


def _apply_command(data: Path, *, config: AgreeConfig, new_classes: Sequence[str]) -> str:
    words = ["holotype", "agree", "apply", str(data)]
    for name in new_classes:
        words += ["--new-class", name]
    for key, value in config.data.model_dump(exclude_defaults=True).items():
        words += ["--set", f"data.{key}={value}"]
    return shlex.join(words)


def disagreements(
    files: Sequence[Path], labels: Mapping[str, str], *, plan: Path | None
) -> dict[str, tuple[str, ...]]:
    """The labels in dispute of every image that two or more voted on, the most votes first.

    In dispute is what annotators chose differently, and what all of them chose otherwise than the dataset
    says, whose label then comes last.
    """
    from holotype.agree.votes import read_votes

    votes, problems = read_votes(files, plan=plan)
    if problems:
        note(f"{len(problems)} votes cannot be used, first {problems[0]}")
    disputed: dict[str, tuple[str, ...]] = {}
    for path, row in zip(votes.items, votes.table, strict=True):
        counts = Counter(votes.classes[vote] for vote in row if vote >= 0)
        if counts.total() < 2 or path not in labels:
            continue
        names = sorted(counts, key=lambda name: (-counts[name], name))
        if len(names) == 1 and names[0] != labels[path]:
            names.append(labels[path])
        if len(names) > 1:
            disputed[path] = tuple(names)
    gone = sum(path not in labels for path in votes.items)
    if gone:
        note(f"{gone} of {len(votes.items)} images that were voted on are not in the dataset")
    return disputed


def _check_classes(disputed: Mapping[str, tuple[str, ...]], classes: Sequence[str], *, where: Path) -> None:
    for path, names in disputed.items():
        for name in names:
            if name not in classes:
                raise DatasetError(
                    f"annotators chose {name!r} for {path}, which is no class of the dataset",
                    where=where,
                    fix=nearest(name, classes),
                )
