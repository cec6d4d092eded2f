"""What an A/B test says of arms that fail, from the rows that a server keeps."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy

from holotype.experiment import Rule, Status
from holotype.experiment_records import record_rule, status_of
from holotype.records import FEEDBACK, PREDICTIONS, connect

EXPERIMENT = "e" * 16


def seen(folder: Path, rows: list[dict[str, Any]], labels: dict[str, str], rule: Rule) -> Status:
    """The status of an experiment of these rows, and of these labels by id."""
    engine = connect(f"sqlite:///{folder / 'ab.db'}")
    record_rule(engine, EXPERIMENT, rule)
    told = [{"id": identity, "at": 0.0, "label": label} for identity, label in labels.items()]
    with engine.begin() as connection:
        connection.execute(sqlalchemy.insert(PREDICTIONS), rows)
        if told:
            connection.execute(sqlalchemy.insert(FEEDBACK), told)
    try:
        return status_of(engine, EXPERIMENT, rule)
    finally:
        engine.dispose()


def row(arm: str, label: str | None, *, identity: str | None = None, **more: Any) -> dict[str, Any]:
    """An answer; without a label the arm failed."""
    identity = identity or uuid.uuid4().hex
    return {
        "id": identity, "arm": arm, "experiment": EXPERIMENT, "at": time.time(), "model": "m", "bundle": "b",
        "key": identity, "label": label, "probability": 0.9 if label else None, "sure": True,
        "milliseconds": 5.0 if label else None, **more,
    }  # fmt: skip


def answers(
    arm: str, *, count: int, failing: int, accuracy: float, seed: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of an arm, of which some failed, and what each image was: whoever answered, a client can tell."""
    rng = np.random.default_rng(seed)
    rows = [
        row(arm, None if number < failing else "shirt" if rng.random() < accuracy else "dress")
        for number in range(count)
    ]
    return rows, {one["id"]: "shirt" for one in rows}


def of_the_same_images(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """As in a shadow: both arms are asked about each."""
    for one, other in zip(rows, others, strict=True):
        other["id"] = other["key"] = one["id"]


def champion_and_failing(failing: int, *, shadow: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """900 answers of a champion that never fails, and those of a challenger with a tenth of the keys."""
    rows, _ = answers("champion", count=900, failing=0, accuracy=0.9, seed=0)
    others, _ = answers("challenger", count=900 if shadow else 100, failing=failing, accuracy=0.9, seed=1)
    if shadow:
        of_the_same_images(rows, others)
    return rows, others


@pytest.mark.parametrize("shadow", [False, True])
def test_a_challenger_that_fails_is_neither_better_nor_promoted(tmp_path: Path, shadow: bool) -> None:
    """Of its 1,000 images it fails on 400, and is right about all others; the champion about nine of ten."""
    rows, labels = answers("champion", count=1000, failing=0, accuracy=0.9, seed=0)
    others, more = answers("challenger", count=1000, failing=400, accuracy=1.0, seed=1)
    if shadow:
        of_the_same_images(rows, others)
    else:
        labels |= more
    found = seen(tmp_path, [*rows, *others], labels, Rule(share=0.5, shadow=shadow))
    assert (found.challenger.answers, found.challenger.failed, found.challenger.keys) == (600, 400, 1000)
    assert (found.champion.answers, found.champion.failed) == (1000, 0)
    assert found.challenger.labelled == 1000
    assert found.challenger.accuracy == pytest.approx(0.6)
    assert found.verdict == "worse"
    assert found.fails_more
    assert "fails more often" in found.advice


def test_without_a_single_label_it_is_known(tmp_path: Path) -> None:
    rows, _ = answers("champion", count=900, failing=2, accuracy=0.9, seed=0)
    others, _ = answers("challenger", count=100, failing=10, accuracy=0.9, seed=1)
    found = seen(tmp_path, [*rows, *others], {}, Rule(share=0.1))
    assert found.fails_more
    assert found.verdict == "undecided"


@pytest.mark.parametrize("shadow", [False, True])
def test_arms_that_fail_alike_are_compared_by_their_answers(tmp_path: Path, shadow: bool) -> None:
    rows, labels = answers("champion", count=1000, failing=30, accuracy=0.7, seed=0)
    others, more = answers("challenger", count=1000, failing=33, accuracy=0.9, seed=1)
    if shadow:
        for one, other in zip(rows, reversed(others), strict=True):
            other["id"] = other["key"] = one["id"]
    else:
        labels |= more
    found = seen(tmp_path, [*rows, *others], labels, Rule(share=0.5, shadow=shadow))
    assert not found.fails_more
    assert found.verdict == "better"
    assert found.advice == "promote: the challenger is better"


def test_one_process_that_was_lost_condemns_nobody(tmp_path: Path) -> None:
    rows, _ = answers("champion", count=900, failing=0, accuracy=0.9, seed=0)
    others, _ = answers("challenger", count=100, failing=4, accuracy=0.9, seed=1)
    assert not seen(tmp_path, [*rows, *others], {}, Rule(share=0.1)).fails_more


@pytest.mark.parametrize("shadow", [False, True])
def test_what_was_in_flight_then_condemns_nobody_either(tmp_path: Path, shadow: bool) -> None:
    """A whole batch went with it, which the server writes down under one key."""
    rows, others = champion_and_failing(64, shadow=shadow)
    for other in others[:64]:
        other["key"] = "the end of a process"
    found = seen(tmp_path, [*rows, *others], {}, Rule(share=0.1, shadow=shadow))
    assert found.challenger.failed == 64
    assert not found.fails_more


@pytest.mark.parametrize("shadow", [False, True])
def test_processes_that_are_lost_again_and_again_do(tmp_path: Path, shadow: bool) -> None:
    rows, others = champion_and_failing(60, shadow=shadow)
    for number, other in enumerate(others[:60]):
        other["key"] = f"end {number // 4}"
    assert seen(tmp_path, [*rows, *others], {}, Rule(share=0.1, shadow=shadow)).fails_more


def test_a_key_that_fails_again_and_again_is_one(tmp_path: Path) -> None:
    rows, _ = answers("champion", count=900, failing=0, accuracy=0.9, seed=0)
    others, _ = answers("challenger", count=100, failing=0, accuracy=0.9, seed=1)
    others += [row("challenger", None, key="one") for _ in range(50)]
    found = seen(tmp_path, [*rows, *others], {}, Rule(share=0.1))
    assert found.challenger.failed == 50
    assert not found.fails_more


@pytest.mark.parametrize(("shadow", "verdict"), [(True, "promote"), (False, "too slow")])
def test_a_shadow_has_no_latency_to_speak_of(tmp_path: Path, shadow: bool, verdict: str) -> None:
    """It answers at the lowest priority, when nobody else is to be answered."""
    rows, labels = answers("champion", count=1000, failing=0, accuracy=0.6, seed=0)
    others, more = answers("challenger", count=1000, failing=0, accuracy=0.9, seed=1)
    for other in others:
        other["milliseconds"] = 500.0
    if shadow:
        of_the_same_images(rows, others)
    found = seen(
        tmp_path, [*rows, *others], labels if shadow else labels | more, Rule(share=0.5, shadow=shadow)
    )
    assert found.verdict == "better"
    assert found.too_slow == (not shadow)
    assert verdict in found.advice


def test_how_late_it_was_counts_and_how_fast_it_failed_does_not(tmp_path: Path) -> None:
    rows = [row("champion", "shirt") for _ in range(100)]
    late = [row("challenger", None, milliseconds=5000.0) for _ in range(20)]
    failed = [row("challenger", None) for _ in range(500)]
    served = [row("challenger", "shirt") for _ in range(80)]
    found = seen(tmp_path, [*rows, *late, *failed, *served], {}, Rule(share=0.5))
    assert found.challenger.p95_ms == 5000
    assert found.champion.p95_ms == 5
    assert found.too_slow
