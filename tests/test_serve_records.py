"""What a server answered is kept, whatever happens to it, its database and its disk; and its log is JSON."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from holotype.database import FEEDBACK, PREDICTIONS, connect
from servers import Server, refused, serving, stalled, wait_for
from tiny import CLASSES, picture

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to find processes")


def kept(url: str, table: sqlalchemy.Table) -> dict[str, str]:
    """Labels by id."""
    engine = connect(url)
    with engine.connect() as connection:
        rows = {row.id: row.label for row in connection.execute(sqlalchemy.select(table.c.id, table.c.label))}
    engine.dispose()
    return rows


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.client.get("/stats").json()["records"]
    return found


def ask(server: Server, colour: str) -> str:
    """The id of an answer."""
    return str(server.predict(picture(colour)).json()["results"][0]["id"])


def test_a_killed_front_loses_no_answer(tiny_bundle: Path, tmp_path: Path) -> None:
    """Each answer that a client has is in the journal, however soon after it the front is gone."""
    later = tmp_path / "later"
    url = f"sqlite:///{later / 'answers.db'}"
    settings = {"records": {"database": url, "journal": str(tmp_path / "journal")}}
    answered, told = {}, {}
    for turn in range(3):
        with serving(tiny_bundle, folder=tmp_path, **settings) as server:
            for number in range(5 + turn):
                colour = CLASSES[number % 3]
                identity = ask(server, colour)
                answered[identity] = colour
                if number == 2:
                    assert (
                        server.client.post("/feedback", json={"id": identity, "label": "red"}).status_code
                        == 202
                    )
                    told[identity] = "red"
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
    later.mkdir()
    with serving(tiny_bundle, folder=tmp_path, **settings) as server:
        wait_for(lambda: state(server)["pending_bytes"] == 0 and bool(state(server)["database"]), "rows")
        assert state(server)["dropped"] == 0
    assert kept(url, PREDICTIONS) == answered
    assert kept(url, FEEDBACK) == told


def test_a_journal_that_cannot_be_written_comes_back(tiny_bundle: Path, tmp_path: Path) -> None:
    """No file of the front may grow, and the folder of its journal is gone: so it cannot be opened either."""
    resource = pytest.importorskip("resource")
    later, folder = tmp_path / "later", tmp_path / "journal"
    url = f"sqlite:///{later / 'answers.db'}"
    settings = {"records": {"database": url, "journal": str(folder)}, "log": "none"}
    with serving(tiny_bundle, folder=tmp_path, **settings) as server:
        answered = {ask(server, "red"): "red"}
        front, unlimited = server.process.pid, resource.RLIM_INFINITY
        resource.prlimit(front, resource.RLIMIT_FSIZE, (0, unlimited))
        folder.rename(tmp_path / "away")
        for colour in CLASSES:
            answered[ask(server, colour)] = colour
            began = time.monotonic()
            told = {"id": next(reversed(answered)), "label": colour}
            refused(server.client.post("/feedback", json=told), 503)
            assert time.monotonic() - began < 4  # it is known at once that it will not be
        found = state(server)
        assert (found["journal"], found["in_memory"], found["dropped"]) == (False, 6, 0)
        assert "holotype_records_journal_up 0.0" in server.client.get("/metrics").text
        (tmp_path / "away").rename(folder)
        resource.prlimit(front, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        wait_for(lambda: state(server)["journal"], "journal")
        assert server.client.post("/feedback", json=told).status_code == 202
        later.mkdir()
        wait_for(lambda: state(server)["pending_bytes"] == 0 == state(server)["in_memory"], "rows")
        assert state(server)["dropped"] == 0
    assert kept(url, PREDICTIONS) == answered
    assert kept(url, FEEDBACK)[told["id"]] == told["label"]


def test_every_line_of_the_log_is_json(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = {"records": {"database": f"sqlite:///{tmp_path / 'never' / 'a.db'}", "journal": str(tmp_path)}}
    with serving(tiny_bundle, folder=tmp_path, **settings) as server:
        server.predict(picture())
        os.kill(server.workers[0], signal.SIGKILL)
        wait_for(lambda: "is gone" in server.log.read_text(), "notice")
        wait_for(lambda: "is down" in server.log.read_text(), "warning")
        server.wait_ready()
        server.predict(picture())
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    notes = [line for line in lines if "text" in line]
    assert {"route", "status", "ms"} <= set(next(line for line in lines if "text" not in line))
    assert all(set(line) == {"at", "level", "text"} for line in notes)
    levels = {line["text"].partition(" (")[0]: line["level"] for line in notes}
    assert levels["an inference process is gone"] == levels["the database is down"] == "warning"
    assert [line["level"] for line in notes if line["text"].startswith("serving")] == ["info"]


def test_a_line_that_nobody_answers_is_seen_to_wait(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, folder=tmp_path) as server, stalled(*server.workers):
        asked = [server.send(picture()) for _ in range(5)]

        def longest() -> int:
            return int(max(second["waiting"] for second in server.client.get("/stats").json()["seconds"]))

        wait_for(lambda: longest() == 4, "line on the chart")
        assert not any(one.done() for one in asked)
