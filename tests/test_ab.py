"""`holotype ab` and the flags of an A/B test, through the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import sqlalchemy

from holotype.cli import run
from holotype.database import FEEDBACK, connect
from holotype.experiment import Rule
from holotype.experiment_records import record_rule
from holotype.journal import Journal, open_journal
from holotype.records import Records
from servers import wait_for

EXPERIMENT = "e" * 16


def holotype(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holotype", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def refusal(*arguments: str) -> str:
    """The one line with which a command ends."""
    done = holotype(*arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with an experiment: of 20 labelled answers of each arm 10 and 20 were right."""
    folder = tmp_path_factory.mktemp("ab")
    url = f"sqlite:///{folder / 'ab.db'}"
    engine = connect(url)
    record_rule(engine, EXPERIMENT, Rule(share=0.5, least=5))
    records = Records(engine, Journal(folder / "journal.jsonl", capacity=2**20))
    records.start()
    for arm, right in (("champion", 10), ("challenger", 20)):
        for number in range(20):
            identity = uuid.uuid4().hex
            records.add(
                "prediction",
                {
                    "id": identity, "arm": arm, "experiment": EXPERIMENT, "at": time.time(), "model": "m",
                    "bundle": "b", "key": f"{arm} {number}", "label": "red", "probability": 0.9, "sure": True,
                    "milliseconds": float(number),
                },
            )  # fmt: skip
            label = "red" if number < right else "blue"
            records.add("feedback", {"id": identity, "at": time.time(), "label": label})
    wait_for(lambda: records.written == 80, "rows")
    records.close()
    return url


class TestStatus:
    def test_it_counts_what_the_database_holds(self, url: str) -> None:
        done = holotype("ab", "status", "--database", url, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["experiment"] == EXPERIMENT
        assert (found["champion"]["labelled"], found["champion"]["right"]) == (20, 10)
        assert (found["challenger"]["labelled"], found["challenger"]["right"]) == (20, 20)
        assert (found["verdict"], found["difference"]["value"]) == ("better", pytest.approx(0.5))
        assert found["rule"]["least"] == 5
        assert found["pending"] == 0

    def test_the_latest_database_is_the_one_written_last(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Though its rows are still in the write-ahead log, and another file is younger."""
        monkeypatch.setenv("HOLOTYPE_CACHE", str(tmp_path))
        folder = tmp_path / "experiments"
        folder.mkdir()
        engines = {name: connect(f"sqlite:///{folder / name}.db") for name in ("busy", "idle")}
        for name, engine in engines.items():
            record_rule(engine, name * 4, Rule())
        engines["idle"].dispose()
        with engines["busy"].connect():
            for age, file in enumerate(("busy.db-wal", "idle.db", "busy.db")):
                os.utime(folder / file, (1e9 - age, 1e9 - age))
            done = holotype("ab", "status", "--json")
        engines["busy"].dispose()
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["experiment"] == "busy" * 4

    def test_people_can_read_it(self, url: str) -> None:
        done = holotype("ab", "status", "--database", url, "--experiment", EXPERIMENT)
        assert done.returncode == 0
        assert "promote: the challenger is better" in done.stdout
        assert "champion" in done.stdout

    def test_what_waits_in_a_journal_is_said(
        self, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HOLOTYPE_CACHE", str(tmp_path))
        journal = open_journal(tmp_path / "experiments", url=url, capacity=2**20)
        engine = connect(url)
        with engine.connect() as connection:
            known = connection.execute(sqlalchemy.select(FEEDBACK)).first()
        engine.dispose()
        rows = [
            {"kind": "feedback", "id": known.id, "at": known.at, "label": "red"},  # is there
            {"kind": "feedback", "id": known.id, "at": known.at + 1, "label": "red"},
            {"kind": "feedback", "id": "another", "at": 0.0, "label": "red"},
            {"kind": "prediction", "id": "another", "arm": "champion", "at": 0.0},
        ]
        journal.append([*(json.dumps(row).encode() for row in rows), b"damaged"])
        journal.close()
        done = holotype("ab", "status", "--database", url, "--json")
        assert json.loads(done.stdout)["pending"] == 3
        assert "3 answers and labels wait in a journal" in done.stderr

    def test_a_path_that_is_wrong_is_an_error_of_one_line(self, tmp_path: Path) -> None:
        missing = tmp_path / "typo.db"
        line = refusal("ab", "status", "--database", f"sqlite:///{missing}")
        assert "there is no such file" in line
        assert "--database" in line
        assert not missing.exists()
        (tmp_path / "notes.txt").write_text("this is no database, whatever its name says\n" * 100)
        assert "cannot be read" in refusal("ab", "status", "--database", f"sqlite:///{tmp_path}/notes.txt")

    def test_a_database_that_is_down_is_an_error_of_one_line(self) -> None:
        pytest.importorskip("psycopg")
        url = "postgresql+psycopg://someone:secret@127.0.0.1:1/answers"
        line = refusal("ab", "status", "--database", url)
        assert "cannot be read" in line
        assert "secret" not in line
        assert "start it" in line

    @pytest.mark.parametrize("url", ["nonsense", "postgresql://host:port/name", "mysql+nothing://x/y"])
    def test_what_is_no_url_is_an_error_of_one_line(self, url: str) -> None:
        assert "not a usable database URL" in refusal("ab", "status", "--database", url)

    def test_an_experiment_that_is_not_there_is_said(self, url: str, tmp_path: Path) -> None:
        line = refusal("ab", "status", "--database", url, "--experiment", "other")
        assert EXPERIMENT in line
        empty = f"sqlite:///{tmp_path / 'empty.db'}"
        connect(empty).connect().close()
        assert "holds no experiment" in refusal("ab", "status", "--database", empty)

    def test_without_a_database_it_says_where_it_looked(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HOLOTYPE_CACHE", str(tmp_path))
        assert "no server here kept an experiment" in refusal("ab", "status")


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--share", "10%"), "--share: means nothing without a challenger"),
            (("--shadow",), "--shadow: means nothing without a challenger"),
            (("--auto", "both"), "--auto: means nothing without a challenger"),
            (("--challenger", "b", "--share", "much"), "--share much: is no share; use 10% or 0.1"),
            (("--challenger", "b", "--share", "%"), "is no share"),
            (("--challenger", "b", "--share", "150%"), "share"),
            (("--challenger", "b", "--share", "0"), "share"),
            (("--challenger", "b", "--auto", "always"), "auto"),
        ],
    )
    def test_what_makes_no_sense_is_refused(
        self, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
    ) -> None:
        assert run(["serve", str(tiny_bundle), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
