"""`holotype ab`: how an A/B test stands, read from its database."""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

import sqlalchemy
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from holotype.database import connect, missing, parsed, short
from holotype.errors import ConfigError
from holotype.experiment import Status
from holotype.experiment_records import list_experiments, read_rule, status_of
from holotype.journal import lines_in_journals
from holotype.machine import cache_root

__all__ = ["pending", "status"]

_AT_ONCE = 500

_OTHER = "name another one with --database"


def status(*, database: str | None = None, experiment: str | None = None) -> Status:
    """Of the latest experiment, or the one named, in a database.

    The database defaults to the latest that a server here wrote. `ConfigError` where there is none, where it
    does not answer, and where there is no such experiment in it.
    """
    url = database or _latest_database()
    engine = connect(url)
    shown = engine.url.render_as_string(hide_password=True)
    file = engine.url.database or ""
    if engine.dialect.name == "sqlite" and not file.startswith("file:") and not Path(file).is_file():
        # SQLite would make an empty one.
        raise ConfigError("there is no such file", where=shown, fix=_OTHER)
    try:
        return _status(engine, experiment, where=shown)
    except SQLAlchemyError as error:
        raise _unreadable(engine, error) from error
    finally:
        engine.dispose()


def pending(*, database: str | None = None, journal: Path | None = None) -> int:
    """Answers and labels in journals of servers here that are not in the database yet.

    They are looked for where servers keep them by default, or in the folder `journal`. `ConfigError` where
    the database cannot be read.
    """
    url = database or _latest_database()
    engine = connect(url)
    lines = lines_in_journals(journal or _folder(), url=url)
    count = 0
    try:
        while some := [*itertools.islice(lines, _AT_ONCE)]:
            count += missing(engine, [row for row in map(parsed, some) if row is not None])
    except SQLAlchemyError as error:
        raise _unreadable(engine, error) from error
    finally:
        engine.dispose()
    return count


def _unreadable(engine: sqlalchemy.Engine, error: SQLAlchemyError) -> ConfigError:
    return ConfigError(
        f"the database cannot be read ({short(error)})",
        where=engine.url.render_as_string(hide_password=True),
        fix=f"start it, or {_OTHER}",
    )


def _status(engine: sqlalchemy.Engine, experiment: str | None, *, where: str) -> Status:
    known = list_experiments(engine)
    if not known:
        raise ConfigError("holds no experiment", where=where, fix="run: holotype serve A --challenger B")
    if experiment is not None and experiment not in known:
        raise ConfigError(
            "there is no such experiment", where=experiment, fix=f"there are {', '.join(known[:5])}"
        )
    chosen = experiment or known[0]
    try:
        rule = read_rule(engine, chosen)
    except ValidationError as error:
        raise ConfigError(
            "its rule is not one that is known here", where=f"experiment {chosen}", fix="upgrade holotype"
        ) from error
    if rule is None:
        raise AssertionError("listed without a rule")
    return status_of(engine, chosen, rule)


def _folder() -> Path:
    return cache_root() / "experiments"


def _latest_database() -> str:
    files = sorted(_folder().glob("*.db"), key=_written)
    if not files:
        raise ConfigError(
            "no server here kept an experiment", where=_folder(), fix="name its database with --database"
        )
    return f"sqlite:///{files[-1]}"  # as the server names it


def _written(file: Path) -> float:
    """When a database was last written to; what is new is in its write-ahead log first."""
    moments = [file.stat().st_mtime]
    with suppress(FileNotFoundError):  # it goes with the last connection
        moments.append(file.with_name(f"{file.name}-wal").stat().st_mtime)
    return max(moments)
