"""A stream of images against the baseline of its bundle."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from holotype.drift import Drift, Movement, Seen
from tiny import CLASSES, tiny_baseline


@pytest.fixture
def drift() -> Drift:
    return Drift(tiny_baseline(), classes=CLASSES, window=200, effect=0.2)


def feed(drift: Drift, *, count: int = 200, light: float = 1.0, only: int | None = None) -> None:
    """Images like those of the baseline, darker by `light`, of one class `only`."""
    rng = np.random.default_rng(7)
    embeddings = []
    for number in range(count):
        label = number % 3 if only is None else only
        embedding = (np.eye(3)[label] * 230 + rng.normal(0, 6, 3)) * light
        embeddings.append(embedding)
        scores = np.exp(embedding * 8 / 255 - (embedding * 8 / 255).max())
        distance = float(np.sqrt((((embedding - np.eye(3)[label] * 230) / 6) ** 2).mean()))
        drift.add(Seen(label, float(scores.max() / scores.sum()), float(embedding.sum() / 3 / 255), distance))
    values = np.array(embeddings)
    drift.add_embeddings(
        count, base64.b64encode(np.stack([values.sum(axis=0), (values**2).sum(axis=0)]).tobytes()).decode()
    )


def by_name(drift: Drift) -> dict[str, Movement]:
    return {one.what: one for one in drift.movements()}


def test_nothing_is_said_before_there_are_fifty(drift: Drift) -> None:
    feed(drift, count=49)
    assert drift.movements() == ()


def test_the_same_kind_of_images_does_not_move(drift: Drift) -> None:
    feed(drift)
    found = by_name(drift)
    assert set(found) == {"classes", "confidence", "brightness", "distance", "embedding"}
    assert not [one.what for one in found.values() if one.moved]


def test_darker_images_move_brightness_distance_and_embedding(drift: Drift) -> None:
    feed(drift, light=0.6)
    found = by_name(drift)
    assert found["brightness"].moved
    assert found["distance"].moved
    assert not found["classes"].moved
    assert "median 0.18, at validation 0.30" in found["brightness"].told


def test_one_class_only_moves_the_rates(drift: Drift) -> None:
    feed(drift, only=2)
    found = by_name(drift)
    assert found["classes"].moved
    assert found["classes"].effect == pytest.approx(2 / 3, abs=0.01)
    assert "'blue' 100%, at validation 33%" in found["classes"].told
    assert found["embedding"].moved
    assert not found["brightness"].moved


def test_the_window_forgets(drift: Drift) -> None:
    feed(drift, light=0.6)
    feed(drift)
    assert not [one.what for one in drift.movements() if one.moved]


def test_sums_of_another_size_are_left_out(drift: Drift) -> None:
    drift.add_embeddings(64, base64.b64encode(np.zeros((2, 7)).tobytes()).decode())
    feed(drift, count=60)
    assert by_name(drift)["embedding"].told
