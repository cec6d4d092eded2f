"""Rows on their way into a database: none is lost while the journal has room, and none is written twice."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from holotype.errors import ConfigError
from holotype.experiment import Rule, assign
from holotype.experiment_records import list_experiments, read_rule, record_rule, status_of
from holotype.journal import Journal, open_journal
from holotype.records import FEEDBACK, PREDICTIONS, Records, connect
from servers import wait_for


@contextmanager
def records(
    folder: Path, url: str, *, capacity: int = 2**20, keep_days: float | None = None
) -> Iterator[Records]:
    journal = Journal(folder / "journal.jsonl", capacity=capacity)
    opened = Records(connect(url), journal, keep_days=keep_days)
    opened.start()
    try:
        yield opened
    finally:
        opened.close()


def awkward(file: Path) -> None:
    """Let every write to a file fail from the next time it is opened: the disk is full."""
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/full")


def row(label: str = "shirt", arm: str = "champion", **more: Any) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex, "arm": arm, "experiment": "e" * 16, "at": time.time(), "model": "m",
        "bundle": "b", "key": None, "label": label, "probability": 0.9, "sure": True, "milliseconds": 5.0,
        **more,
    }  # fmt: skip


def count(url: str, table: sqlalchemy.Table) -> int:
    with connect(url).connect() as connection:
        return int(connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(table)).scalar())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'answers.db'}"


def test_what_is_committed_is_on_the_disk(url: str) -> None:
    """For the journal forgets it then, and a power failure may come next."""
    engine = connect(url)
    with engine.connect() as connection:
        found = [
            connection.execute(sqlalchemy.text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous")
        ]
    engine.dispose()
    assert found == ["wal", 2]  # FULL


def test_rows_arrive(tmp_path: Path, url: str) -> None:
    with records(tmp_path, url) as opened:
        kept = [opened.add("prediction", row()) for _ in range(1200)]
        assert all(one.result(10) for one in kept)
        wait_for(lambda: opened.written == 1200, "rows")
        assert opened.pending == 0
        assert opened.up
    assert count(url, PREDICTIONS) == 1200
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_the_last_label_counts_and_nothing_is_written_twice(tmp_path: Path, url: str) -> None:
    one = row()
    with records(tmp_path, url) as opened:
        for _ in range(2):
            opened.add("prediction", one)
        for label in ("shirt", "dress"):
            opened.add("feedback", {"id": one["id"], "at": 0.0, "label": label})
    assert (count(url, PREDICTIONS), count(url, FEEDBACK)) == (1, 1)
    with connect(url).connect() as connection:
        assert connection.execute(sqlalchemy.select(FEEDBACK.c.label)).scalar() == "dress"


def test_both_arms_of_a_shadowed_image_stay(tmp_path: Path, url: str) -> None:
    first, second = row(), row()
    with records(tmp_path, url) as opened:
        opened.add("prediction", first).result(10)
        wait_for(lambda: opened.written == 1, "row")
        opened.add("prediction", second)
        opened.add("prediction", {**first, "arm": "challenger"})
    assert count(url, PREDICTIONS) == 3


def test_a_database_that_is_away_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    url = f"sqlite:///{folder / 'answers.db'}"
    with records(tmp_path, url) as opened:
        assert all(opened.add("prediction", row()).result(10) for _ in range(30))
        assert not opened.up
        assert opened.pending > 0
        folder.mkdir()
        wait_for(lambda: opened.written == 30, "rows")
    assert count(url, PREDICTIONS) == 30


def test_what_one_server_left_the_next_one_writes(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    url = f"sqlite:///{folder / 'answers.db'}"
    with records(tmp_path, url) as opened:
        assert opened.add("prediction", row()).result(10)
    folder.mkdir()
    with records(tmp_path, url) as opened:
        wait_for(lambda: opened.written == 1, "row")
    assert count(url, PREDICTIONS) == 1


def test_beyond_the_capacity_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'never' / 'answers.db'}"
    with records(tmp_path, url, capacity=2000) as opened:
        kept = [opened.add("prediction", row()).result(10) for _ in range(20)]
        assert 0 < sum(kept) < 20
        assert opened.dropped == 20 - sum(kept)
        assert opened.pending <= 2000


def test_a_row_the_database_refuses_holds_up_nobody(tmp_path: Path, url: str) -> None:
    with records(tmp_path, url) as opened:
        opened.add("prediction", {**row(), "nonsense": 1})
        opened.add("prediction", row())
        wait_for(lambda: opened.pending == 0, "end")
    assert count(url, PREDICTIONS) >= 1


def test_a_wrong_url_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a usable database URL"):
        connect("nonsense")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a disk that is always full")
class TestJournalThatCannotBeWritten:
    """The database is away as well, but where it is said that it is not."""

    def test_it_comes_back_and_nothing_is_lost(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "later"
        file, url = tmp_path / "journal.jsonl", f"sqlite:///{folder / 'answers.db'}"
        awkward(file)
        with records(tmp_path, url) as opened:
            wait_for(lambda: opened.up is False, "notice")
            told = [opened.add("prediction", row()) for _ in range(700)]
            assert not opened.add("feedback", {"id": "a", "at": 0.0, "label": "shirt"}).result(10)
            assert not any(one.result(10) for one in told)
            assert (opened.held, opened.dropped, opened.journal_up) == (701, 0, False)
            file.unlink()
            wait_for(lambda: opened.journal_up and not opened.held, "journal")
            assert opened.add("prediction", row()).result(10)
            folder.mkdir()
            wait_for(lambda: opened.written == 702, "rows")
            assert opened.dropped == 0
        assert (count(url, PREDICTIONS), count(url, FEEDBACK)) == (701, 1)
        said = capsys.readouterr().err
        assert "the journal cannot be written (No space left on device): answers wait in memory" in said
        assert "the journal can be written again" in said
        assert said.count("cannot be written") == 1

    def test_rows_go_straight_into_a_database_that_is_there(self, tmp_path: Path, url: str) -> None:
        awkward(tmp_path / "journal.jsonl")
        with records(tmp_path, url) as opened:
            wait_for(lambda: bool(opened.up), "database")
            told = [opened.add("prediction", row()) for _ in range(5)]
            assert all(one.result(10) for one in told)
            assert (opened.journal_up, opened.dropped) == (False, 0)
        assert count(url, PREDICTIONS) == 5

    def test_what_has_no_place_is_counted_from_all_threads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("holotype.records._IN_MEMORY", 10)
        awkward(tmp_path / "journal.jsonl")
        with records(tmp_path, f"sqlite:///{tmp_path / 'never' / 'answers.db'}") as opened:
            with ThreadPoolExecutor(4) as pool:
                told = [pool.submit(opened.add, "prediction", row()) for _ in range(400)]
            assert not any(one.result().result(10) for one in told)
            # A batch on its way to the journal leaves its places to others for a moment.
            wait_for(lambda: opened.held + opened.dropped == 400, "end")
        assert opened.dropped == 400
        assert "answers and labels are lost from here on, and counted" in capsys.readouterr().err

    def test_the_rest_of_a_line_is_cut_off(self, tmp_path: Path) -> None:
        """A limit on the size of files is a disk that takes half of a write."""
        resource = pytest.importorskip("resource")
        journal = Journal(tmp_path / "journal.jsonl", capacity=2**20)
        assert journal.append([b"first"]) == 1
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(OSError, match="No space left"):
                journal.append([b"second"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
            with pytest.raises(OSError, match="too large"):
                journal.append([b"second"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert journal.append([b"third"]) == 1
        journal.sync()
        assert (tmp_path / "journal.jsonl").read_bytes() == b"first\nthird\n"
        journal.close()


class TestExperiment:
    def test_the_rule_is_settled_before(self, url: str) -> None:
        engine = connect(url)
        record_rule(engine, "e" * 16, Rule(share=0.2))
        record_rule(engine, "e" * 16, Rule(share=0.2))
        assert read_rule(engine, "e" * 16) == Rule(share=0.2)
        assert list_experiments(engine) == ["e" * 16]
        with pytest.raises(ConfigError, match=r"begun under another rule \(share\)"):
            record_rule(engine, "e" * 16, Rule(share=0.3))

    def test_status_counts_labels(self, tmp_path: Path, url: str) -> None:
        with records(tmp_path, url) as opened:
            for arm, right in (("champion", 150), ("challenger", 190)):
                for number in range(200):
                    told = row(arm=arm, milliseconds=float(number))
                    opened.add("prediction", told)
                    truth = "shirt" if number < right else "dress"
                    opened.add("feedback", {"id": told["id"], "at": 0.0, "label": truth})
            opened.add("prediction", row(experiment="f" * 16))
        found = status_of(connect(url), "e" * 16, Rule(share=0.5))
        assert (found.champion.answers, found.champion.labelled, found.champion.right) == (200, 200, 150)
        assert found.challenger.accuracy == pytest.approx(0.95)
        assert found.champion.p95_ms == pytest.approx(190)
        assert (found.verdict, found.advice) == ("better", "promote: the challenger is better")
        assert not found.ratio_is_off
        off = status_of(connect(url), "e" * 16, Rule(share=0.1))
        assert off.ratio_is_off
        assert off.verdict == "undecided"

    def test_shadowed_images_are_compared_in_pairs(self, tmp_path: Path, url: str) -> None:
        with records(tmp_path, url) as opened:
            for number in range(300):
                told = row("shirt" if number % 5 else "dress")
                opened.add("prediction", told)
                opened.add("prediction", {**told, "arm": "challenger", "label": "shirt"})
                opened.add("feedback", {"id": told["id"], "at": 0.0, "label": "shirt"})
        found = status_of(connect(url), "e" * 16, Rule(shadow=True))
        assert found.difference.value == pytest.approx(0.2)
        assert found.verdict == "better"

    def test_a_key_always_meets_the_same_arm_and_shares_hold(self) -> None:
        keys = [f"user-{number}".encode() for number in range(20_000)]
        arms = [assign(key, experiment="one", share=0.1) for key in keys]
        assert arms == [assign(key, experiment="one", share=0.1) for key in keys]
        assert arms.count("challenger") / len(arms) == pytest.approx(0.1, abs=0.01)
        others = [assign(key, experiment="two", share=0.1) for key in keys]
        both = sum(a == b == "challenger" for a, b in zip(arms, others, strict=True))
        assert both / len(keys) == pytest.approx(0.01, abs=0.004)

    def test_answers_to_one_key_are_one_answer(self, tmp_path: Path, url: str) -> None:
        """A key is what an arm is given to: a client that asks again and again proves nothing more."""
        with records(tmp_path, url) as opened:
            for number in range(400):
                told = row("dress", arm="challenger", key="one", at=float(number))
                opened.add("prediction", told)
                opened.add("feedback", {"id": told["id"], "at": 0.0, "label": "shirt"})
            for number in range(9):
                told = row("shirt", key=str(number))
                opened.add("prediction", told)
                opened.add("feedback", {"id": told["id"], "at": 0.0, "label": "shirt"})
        found = status_of(connect(url), "e" * 16, Rule(share=0.1, least=1))
        assert (found.challenger.answers, found.challenger.keys, found.challenger.labelled) == (400, 1, 1)
        assert not found.ratio_is_off
        assert found.verdict == "undecided"


def test_with_a_slow_disk_rows_pass_through_memory(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holotype.records._SLOW_SECONDS", 0.0)  # as if every write took too long
    with records(tmp_path, url) as opened:
        kept = [opened.add("prediction", row()) for _ in range(1200)]
        assert all(one.result(10) for one in kept)
        wait_for(lambda: opened.written == 1200 and not opened.held, "rows")
        assert opened.dropped == 0
    assert count(url, PREDICTIONS) == 1200


class TestOldDatabase:
    def test_one_of_before_is_opened_and_gets_its_indexes(self, tmp_path: Path, url: str) -> None:
        with connect(url).begin() as connection:
            connection.exec_driver_sql(
                "CREATE TABLE holotype_predictions (id VARCHAR(40) NOT NULL, arm VARCHAR(12) NOT NULL,"
                " experiment VARCHAR(16), at FLOAT, model TEXT, bundle VARCHAR(64), key VARCHAR(32),"
                " label TEXT, probability FLOAT, sure BOOLEAN, milliseconds FLOAT, PRIMARY KEY (id, arm))"
            )
            connection.exec_driver_sql(
                "CREATE INDEX ix_holotype_predictions_experiment ON holotype_predictions (experiment)"
            )
            connection.exec_driver_sql(
                "INSERT INTO holotype_predictions (id, arm, experiment, at)"
                " VALUES ('a', 'champion', 'e', 1.0)"
            )
        with records(tmp_path, url) as opened:
            assert opened.add("prediction", row()).result(10)
            wait_for(lambda: opened.written == 1, "row")
        assert count(url, PREDICTIONS) == 2
        with connect(url).connect() as connection:
            plan = connection.exec_driver_sql(
                "EXPLAIN QUERY PLAN SELECT milliseconds FROM holotype_predictions WHERE experiment = 'e'"
                " AND arm = 'champion' ORDER BY at DESC LIMIT 2000"
            ).all()
        assert "holotype_predictions_arm" in str(plan)
        assert "TEMP B-TREE" not in str(plan)


class TestRetention:
    def test_what_is_too_old_goes_and_an_experiment_goes_as_a_whole(self, tmp_path: Path, url: str) -> None:
        engine, day, now = connect(url), 86_400.0, time.time()
        record_rule(engine, "e" * 16, Rule())
        record_rule(engine, "f" * 16, Rule())
        ages = [
            ("lone old", None, 40), ("lone young", None, 2), ("alive, old", "e" * 16, 40),
            ("alive, young", "e" * 16, 1), ("over", "f" * 16, 31),
        ]  # fmt: skip
        with records(tmp_path, url) as opened:
            for name, experiment, days in ages:
                at = now - days * day
                opened.add("prediction", row(id=name, experiment=experiment, at=at))
                opened.add("feedback", {"id": name, "at": at, "label": "shirt"})
            for number in range(1200):  # more than are deleted at once
                opened.add("prediction", row(id=f"many {number}", experiment=None, at=now - 50 * day))
            opened.add("feedback", {"id": "without an answer", "at": now - 40 * day, "label": "shirt"})
            wait_for(lambda: opened.written == 2 * len(ages) + 1201, "rows")
        with records(tmp_path, url, keep_days=30) as opened:
            wait_for(lambda: count(url, PREDICTIONS) == 3 == count(url, FEEDBACK), "end of the old ones")
        with engine.connect() as connection:
            left = set(connection.execute(sqlalchemy.select(FEEDBACK.c.id)).scalars())
        assert left == {"lone young", "alive, old", "alive, young"}


class TestJournal:
    def test_lines_that_come_while_it_is_made_shorter_stay(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "journal.jsonl", capacity=2**28)
        stop, sent = threading.Event(), []

        def send() -> None:
            while not stop.is_set():
                line = f"{len(sent)} {'x' * 5000}".encode()
                assert journal.append([line]) == 1
                sent.append(line)

        thread = threading.Thread(target=send)
        thread.start()
        received: list[bytes] = []
        wait_for(lambda: len(sent) > 500, "lines")
        shortened, before = 0, 0
        while shortened < 3 or len(received) < len(sent):
            lines, place = journal.oldest(100)
            received += lines
            journal.forget(place)
            size = (tmp_path / "journal.jsonl").stat().st_size
            shortened, before = shortened + (size < before), size
            if shortened >= 3:
                stop.set()
        thread.join()
        lines, place = journal.oldest(10_000)
        assert received + lines == sent
        journal.forget(place)
        assert journal.pending == 0
        journal.close()
        assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]

    def test_half_a_line_is_cut_off(self, tmp_path: Path, url: str) -> None:
        """What a power failure leaves of the last one."""
        whole = b'{"kind": "prediction"'
        (tmp_path / "journal.jsonl").write_bytes(whole)
        with records(tmp_path, url) as opened:
            assert opened.add("prediction", row()).result(10)
            wait_for(lambda: opened.written == 1, "row")
        assert count(url, PREDICTIONS) == 1

    def test_a_damaged_line_holds_up_nobody(self, tmp_path: Path, url: str) -> None:
        (tmp_path / "journal.jsonl").write_bytes(b'not json\n{"kind": "else"}\n')
        with records(tmp_path, url) as opened:
            assert opened.add("prediction", row()).result(10)
            wait_for(lambda: opened.pending == 0, "end of the journal")
            assert opened.dropped == 2
        assert count(url, PREDICTIONS) == 1

    def test_a_value_the_database_cannot_hold_holds_up_nobody(self, tmp_path: Path, url: str) -> None:
        with records(tmp_path, url) as opened:
            opened.add("prediction", row(sure="perhaps"))
            opened.add("prediction", row())
            wait_for(lambda: opened.pending == 0, "end of the journal")
            assert opened.dropped == 1
        assert count(url, PREDICTIONS) == 1

    def test_the_later_label_stays_whichever_is_written_first(self, tmp_path: Path, url: str) -> None:
        """The journal of another server may come late."""
        with records(tmp_path, url) as opened:
            for at, label in ((2.0, "dress"), (1.0, "shirt")):
                opened.add("feedback", {"id": "a", "at": at, "label": label})
                wait_for(lambda: opened.pending == 0, "row")
        with connect(url).connect() as connection:
            assert connection.execute(sqlalchemy.select(FEEDBACK.c.label)).scalar() == "dress"

    def test_who_stops_waiting_stops_nobody_else(self, tmp_path: Path, url: str) -> None:
        with records(tmp_path, url) as opened:
            opened.add("prediction", row()).cancel()
            assert opened.add("prediction", row()).result(10)
            wait_for(lambda: opened.pending == 0, "rows")

    def test_each_server_has_its_own_and_the_next_one_takes_over(self, tmp_path: Path, url: str) -> None:
        first = open_journal(tmp_path, url=url, capacity=2**20)
        second = open_journal(tmp_path, url=url, capacity=2**20)
        assert first.append([b"1"]) == second.append([b"2"]) == 1
        second.close()
        first.close()
        third = open_journal(tmp_path, url=url, capacity=2**20)
        assert third.oldest(10)[0] == [b"1", b"2"]
        other = open_journal(tmp_path, url="sqlite:///other.db", capacity=2**20)
        assert other.oldest(10)[0] == []
        third.close()
        other.close()
