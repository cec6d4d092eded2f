"""Versions of a model that change places at the same moment, or that cannot answer any more."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from holotype.bundle import open_bundle
from holotype.policy import Policy
from servers import LIVENESS, Server, refused, serving, wait_for
from tiny import picture, write_tiny_bundle

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")

BOSS = {"X-API-Key": "boss"}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "first").path


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "second", policy=Policy(temperature=3.0)).path


@contextmanager
def managed(*targets: Path, folder: Path, **settings: Any) -> Iterator[Server]:
    env = {"HOLOTYPE_ADMIN_KEY": "boss", "HOLOTYPE_CACHE": str(folder / "cache")}
    settings["records"] = {"journal": str(folder)}
    with serving(*targets, folder=folder, env=env, **settings) as server:
        server.client.headers.update(BOSS)
        yield server


def versions(server: Server) -> dict[str, Any]:
    (model,) = server.client.get("/admin/models").json()["models"]
    return dict(model)


def bundle(version: dict[str, Any] | None) -> str | None:
    return None if version is None else str(version["bundle"])


def change(server: Server, what: str) -> httpx.Response:
    return httpx.post(f"{server.url}/admin/models/first/{what}", headers=BOSS, timeout=LIVENESS)


def test_two_promotions_at_once_are_one(first: Path, second: Path, tmp_path: Path) -> None:
    """Of a shadow, whose processes are started anew for it: the second one is told."""
    with (
        managed(first, challenger=second, folder=tmp_path, experiment={"shadow": True}) as server,
        ThreadPoolExecutor(3) as clients,
    ):
        asked = [clients.submit(change, server, what) for what in ("promote", "promote", "promote")]
        told = sorted((one.result() for one in asked), key=lambda one: one.status_code)
        assert [one.status_code for one in told] == [200, 409, 409]
        for one in told[1:]:
            assert "at this moment" in refused(one, 409)
        now = versions(server)
        assert bundle(now["live"]) == open_bundle(second).hash
        assert bundle(now["previous"]) == open_bundle(first).hash
        assert now["challenger"] is None
        assert server.predict(picture()).json()["bundle"] == open_bundle(second).hash
        assert change(server, "rollback").status_code == 200
        assert server.predict(picture()).json()["bundle"] == open_bundle(first).hash


def test_two_loads_at_once_are_one(first: Path, second: Path, tmp_path: Path) -> None:
    def load(server: Server) -> httpx.Response:
        order = {"path": str(second)}
        return httpx.post(f"{server.url}/admin/models", json=order, headers=BOSS, timeout=LIVENESS)

    with managed(first, folder=tmp_path) as server, ThreadPoolExecutor(2) as clients:
        told = [one.result() for one in [clients.submit(load, server) for _ in range(2)]]
        assert sorted(one.status_code for one in told) == [200, 409]
        assert len(server.workers) == 2


def kill_for_good(server: Server, path: Path, role: str) -> None:
    """A process that dies, and whose bundle has been replaced: none takes its place."""
    manifest = path / "holotype.json"
    manifest.write_text(manifest.read_text().replace("red", "tomato"))
    (process,) = versions(server)[role]["processes"]
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: versions(server)[role]["processes"] == [], "end of the process")


def test_what_cannot_answer_is_not_promoted(first: Path, second: Path, tmp_path: Path) -> None:
    with managed(first, folder=tmp_path) as server:
        live = server.info()["bundle"]
        assert server.client.post("/admin/models", json={"path": str(second)}).status_code == 200
        kill_for_good(server, second, "candidate")
        assert "no inference process" in refused(change(server, "promote"), 409)
        assert server.predict(picture()).json()["bundle"] == live
        # And it may be replaced.
        third = write_tiny_bundle(tmp_path / "third", policy=Policy(temperature=2.0)).path
        assert server.client.post("/admin/models", json={"path": str(third)}).status_code == 200
        assert change(server, "promote").status_code == 200
        assert server.predict(picture()).json()["bundle"] == open_bundle(third).hash


def test_nor_rolled_back_to(first: Path, second: Path, tmp_path: Path) -> None:
    with managed(first, folder=tmp_path) as server:
        assert server.client.post("/admin/models", json={"path": str(second)}).status_code == 200
        assert change(server, "promote").status_code == 200
        kill_for_good(server, first, "previous")
        assert "no inference process" in refused(change(server, "rollback"), 409)
        assert server.predict(picture()).json()["bundle"] == open_bundle(second).hash


def test_an_experiment_that_is_over_stays_so(first: Path, second: Path, tmp_path: Path) -> None:
    """Though champion and challenger have their places back, nobody watches them any more."""
    third = write_tiny_bundle(tmp_path / "third", policy=Policy(temperature=2.0)).path
    with managed(first, challenger=second, folder=tmp_path, experiment={"share": 0.9}) as server:
        assert server.client.post("/admin/models", json={"path": str(third)}).status_code == 200
        assert change(server, "promote").status_code == 200
        assert change(server, "rollback").status_code == 200
        assert bundle(versions(server)["live"]) == open_bundle(first).hash
        assert server.client.get("/experiment").json()["over"]
        for number in range(5):
            key = {"X-Holotype-Subject": f"user-{number}"}
            told = server.client.post("/predict", content=picture(), headers=key)
            assert told.headers["holotype-arm"] == "champion"
