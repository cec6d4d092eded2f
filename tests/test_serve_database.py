"""Answers and labels under load while PostgreSQL is stopped and started: none lost, none late, none wrong."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import sqlalchemy

from holotype.policy import Policy
from holotype.records import FEEDBACK, PREDICTIONS, connect
from postgres import BINARIES, postgres
from servers import LIVENESS, Server, refused, serving, wait_for
from tiny import CLASSES, picture, write_tiny_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BINARIES, reason="PostgreSQL is not installed"),
]


def count(engine: sqlalchemy.Engine, table: sqlalchemy.Table) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(table)).scalar())


def test_a_database_that_goes_and_comes_costs_nothing(tmp_path: Path) -> None:
    champion = write_tiny_bundle(tmp_path / "champion").path
    challenger = write_tiny_bundle(tmp_path / "challenger", policy=Policy(temperature=2.0)).path
    stop = threading.Event()

    def ask(url: str, user: int) -> list[tuple[int, float]]:
        seen = []
        with httpx.Client(base_url=url, timeout=LIVENESS) as client:
            while not stop.is_set():
                began = time.monotonic()
                colour = CLASSES[user % 3]
                answer = client.post(
                    "/predict", content=picture(colour), headers={"X-Holotype-Subject": str(user)}
                )
                seen.append((answer.status_code, time.monotonic() - began))
                result = answer.json()["results"][0]
                assert result["label"] == colour
                told = client.post("/feedback", json={"id": result["id"], "label": colour})
                seen.append((told.status_code, 0.0))
        return seen

    with postgres() as database:
        settings = {
            "records": {"database": database.url, "journal": str(tmp_path)},
            "experiment": {"share": 0.5},
            "log": "none",
        }
        with (
            serving(champion, challenger=challenger, folder=tmp_path, **settings) as server,
            ThreadPoolExecutor(4) as clients,
        ):
            asked = [clients.submit(ask, server.url, user) for user in range(4)]
            time.sleep(2)
            database.stop()
            wait_for(lambda: "is down" in server.log.read_text(), "notice")
            time.sleep(2)
            assert server.client.get("/stats").json()["records"]["pending_bytes"] > 0
            told = _change_of_mind(server)
            database.start()
            time.sleep(2)
            stop.set()
            seen = [entry for one in asked for entry in one.result()]
            seen += [(200, 0.001)]
            answers = [entry for entry in seen if entry[1]]
            assert {status for status, _ in answers} == {200}
            assert {status for status, late in seen if not late} == {202}
            assert max(late for _, late in answers) < 5
            wait_for(lambda: server.client.get("/stats").json()["records"]["pending_bytes"] == 0, "rows")
            assert server.client.get("/stats").json()["records"]["dropped"] == 0
        engine = connect(database.url)
        assert count(engine, PREDICTIONS) == len(answers)
        assert count(engine, FEEDBACK) == len(answers)
        right = sqlalchemy.select(FEEDBACK.c.label).where(FEEDBACK.c.id == told)
        wrong = (
            sqlalchemy.select(sqlalchemy.func.count())
            .select_from(PREDICTIONS.join(FEEDBACK, PREDICTIONS.c.id == FEEDBACK.c.id))
            .where(PREDICTIONS.c.label != FEEDBACK.c.label)
        )
        with engine.connect() as connection:
            assert connection.execute(right).scalar() == "green"
            assert connection.execute(wrong).scalar() == 0
        engine.dispose()


def _change_of_mind(server: Server) -> str:
    """Tell a wrong label and then the right one, while the database is down; the id."""
    answer = server.client.post("/predict", content=picture("green"), headers={"X-Holotype-Subject": "one"})
    identity = str(answer.json()["results"][0]["id"])
    for label in ("red", "blue", "green"):
        assert server.client.post("/feedback", json={"id": identity, "label": label}).status_code == 202
    refused(server.client.get("/experiment"), 503)
    return identity
