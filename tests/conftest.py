from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny import write_tiny_bundle


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
