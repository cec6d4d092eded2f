from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browsers import open_browser
from digits import write_digits
from holotype import TrainResult
from tiny import write_tiny_bundle

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SMALL = {"data": {"size": 64}, "augment": {"flip": 0.0}}
"""Overrides that make a run on the digits quick; a mirrored digit is a wrong label."""


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees or leaves anything in the user's cache."""
    before = os.environ.get("HOLOTYPE_CACHE")
    os.environ["HOLOTYPE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["HOLOTYPE_CACHE"]
    else:
        os.environ["HOLOTYPE_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real bundle with classes red, green and blue; read-only to tests."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle").path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 real handwritten digits of 3 classes with train, validation and test; read-only."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def probe(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of preset probe on `digits` at 64 pixels; read-only."""
    from holotype import train

    runs = tmp_path_factory.mktemp("runs")
    return train(digits, name="probe", preset="probe", overrides=SMALL, runs=runs)


@pytest.fixture(scope="session")
def tuned(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run with two epochs of fine-tuning on `digits` at 64 pixels; read-only."""
    from holotype import train

    overrides = {**SMALL, "fit": {"epochs": 2, "deterministic": True}}
    return train(digits, name="tuned", overrides=overrides, runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    """Debian's chromium; for tests that are marked `in_browser`."""
    with open_browser(tmp_path / "profile") as driver:
        yield driver
