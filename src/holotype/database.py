"""The tables of what was answered and what turned out to be right, in SQLite or PostgreSQL.

Every row has an id of its own: writing one twice changes nothing, and of two labels of an image the later one
stays, whichever is written first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy
from sqlalchemy import Boolean, Column, Float, Index, MetaData, String, Table, Text, and_, exists, select
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, StatementError

from holotype.errors import ConfigError
from holotype.progress import warn

__all__ = [
    "EXPERIMENTS",
    "FEEDBACK",
    "PREDICTIONS",
    "connect",
    "forget_before",
    "insert",
    "is_refusal",
    "missing",
    "parsed",
    "prepare",
    "short",
]

_METADATA = MetaData()

PREDICTIONS = Table(
    "holotype_predictions",
    _METADATA,
    Column("id", String(40), primary_key=True),
    Column("arm", String(12), primary_key=True),
    Column("experiment", String(16)),
    Column("at", Float),
    Column("model", Text),
    Column("bundle", String(64)),
    Column("key", String(32)),
    Column("label", Text),
    Column("probability", Float),
    Column("sure", Boolean),
    Column("milliseconds", Float),
)
"""An answer of an arm; `key` is a hash."""

FEEDBACK = Table(
    "holotype_feedback",
    _METADATA,
    Column("id", String(40), primary_key=True),
    Column("at", Float),
    Column("label", Text),
)
"""The right label of an image, the last one that was told."""

EXPERIMENTS = Table(
    "holotype_experiments",
    _METADATA,
    Column("id", String(16), primary_key=True),
    Column("at", Float),
    Column("settings", Text),
)
"""The rule of each experiment, as it was when it began."""

# Each look at an experiment counts its rows, and the old ones are looked for again and again.
_INDEXES = (
    Index("holotype_predictions_arm", PREDICTIONS.c.experiment, PREDICTIONS.c.arm, PREDICTIONS.c.at),
    Index("holotype_predictions_at", PREDICTIONS.c.at),
    Index("holotype_feedback_at", FEEDBACK.c.at),
)

_TABLES = {"prediction": PREDICTIONS, "feedback": FEEDBACK}
_STATEMENT_MS = 10_000


def connect(url: str) -> sqlalchemy.Engine:
    """An engine; SQLite in write-ahead mode. `ConfigError` where the URL or its driver is wrong."""
    try:
        arguments: dict[str, Any] = {}
        if url.startswith(("postgresql:", "postgresql+psycopg")):
            # Neither a server that hangs nor a network that is gone may hold a thread for long.
            limits = f"-c statement_timeout={_STATEMENT_MS}"
            arguments = {"connect_timeout": 3, "tcp_user_timeout": _STATEMENT_MS, "options": limits}
        engine = sqlalchemy.create_engine(url, pool_pre_ping=True, connect_args=arguments)
    except (sqlalchemy.exc.ArgumentError, ModuleNotFoundError, ValueError) as error:
        raise ConfigError(
            f"not a usable database URL ({error})",
            where="records.database",
            fix="use sqlite:///FILE, or install a driver: pip install 'holotype[postgres]'",
        ) from error
    if engine.dialect.name == "sqlite":
        sqlalchemy.event.listen(engine, "connect", _in_wal)
    return engine


def _in_wal(connection: Any, _: Any) -> None:
    # The journal forgets what was committed, so that has to be on the disk: NORMAL would leave it to chance.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=3000"):
        connection.execute(f"PRAGMA {pragma}")


def prepare(engine: sqlalchemy.Engine) -> None:
    """Create the tables and indexes that are missing; an index that cannot be made now only costs time."""
    _METADATA.create_all(engine)
    for index in _INDEXES:  # of tables that an earlier version has made
        try:
            with engine.begin() as connection:
                if engine.dialect.name == "postgresql":
                    connection.execute(sqlalchemy.text("SET LOCAL statement_timeout = 0"))
                index.create(connection, checkfirst=True)
        except DBAPIError as error:
            warn(f"the database has no index {index.name} ({short(error)}): what is counted takes longer")


def parsed(line: bytes) -> dict[str, Any] | None:
    """A row as `insert` takes it, from its JSON: a mapping with a `kind` and an `id`; else None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = (
        isinstance(row, dict)
        and row.get("kind") in _TABLES
        and isinstance(row.get("id"), str)
        and isinstance(row.get("arm", ""), str)
        and isinstance(row.get("at", 0.0), (int, float))
    )
    return row if known else None


def insert(engine: sqlalchemy.Engine, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows in one transaction, in place of those of the same id and arm that are older."""
    tables: dict[tuple[str, str | None], dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=_moment):  # of two rows of one id the later one counts
        tables.setdefault((row["kind"], row.get("arm")), {})[row["id"]] = row
    with engine.begin() as connection:
        for (kind, arm), found in tables.items():
            table = _TABLES[kind]
            mine = [] if arm is None else [table.c.arm == arm]
            present = and_(table.c.id.in_(found), *mine)
            # Another server may have told the database of a later one already.
            later = {
                one.id
                for one in connection.execute(select(table.c.id, table.c.at).where(present))
                if (one.at or 0.0) > _moment(found[one.id])
            }
            content = [
                {name: value for name, value in row.items() if name != "kind"}
                for row in found.values()
                if row["id"] not in later
            ]
            if content:
                older = and_(table.c.id.in_([row["id"] for row in content]), *mine)
                connection.execute(sqlalchemy.delete(table).where(older))
                connection.execute(sqlalchemy.insert(table), content)


def missing(engine: sqlalchemy.Engine, rows: Sequence[Mapping[str, Any]]) -> int:
    """How many of these rows `insert` would still write."""
    count = 0
    with engine.connect() as connection:
        for kind, table in _TABLES.items():
            mine = [row for row in rows if row["kind"] == kind]
            columns = (table.c.id, table.c.at, *([table.c.arm] if "arm" in table.c else []))
            query = select(*columns).where(table.c.id.in_([row["id"] for row in mine]))
            known = {(one.id, getattr(one, "arm", None)): one.at or 0.0 for one in connection.execute(query)}
            count += sum(known.get((row["id"], row.get("arm")), -1.0) < _moment(row) for row in mine)
    return count


def _moment(row: Mapping[str, Any]) -> float:
    return float(row.get("at") or 0.0)


def is_refusal(error: StatementError) -> bool:
    """Whether a database that is there does not want a row."""
    gone = isinstance(error, DBAPIError) and error.connection_invalidated
    return not gone and not isinstance(error, (OperationalError, InterfaceError))


def short(error: Exception | None) -> str:
    """What a database said, in one line."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0] if error is not None else ""


def forget_before(engine: sqlalchemy.Engine, moment: float, *, at_most: int) -> int:
    """Delete some of the answers and labels of before `moment` (seconds since 1970); how many images.

    What an experiment counts goes as a whole, once none of it is younger: half of it would be another
    experiment. A label goes with its answer, or by its own age where there is none.
    """
    mine = PREDICTIONS.alias()
    # Both arms are named so that the index serves.
    young = exists().where(
        mine.c.experiment == EXPERIMENTS.c.id, mine.c.arm.in_(("champion", "challenger")), mine.c.at >= moment
    )
    with engine.begin() as connection:
        alive = [row.id for row in connection.execute(select(EXPERIMENTS.c.id).where(young))]
        over = PREDICTIONS.c.experiment.is_(None) | PREDICTIONS.c.experiment.not_in(alive)
        answers = select(PREDICTIONS.c.id).where(PREDICTIONS.c.at < moment, over).distinct().limit(at_most)
        old = [row.id for row in connection.execute(answers)]
        kept = exists().where(PREDICTIONS.c.id == FEEDBACK.c.id)
        labels = select(FEEDBACK.c.id).where(FEEDBACK.c.at < moment, ~kept).limit(at_most)
        lone = [row.id for row in connection.execute(labels)]
        if old:
            connection.execute(sqlalchemy.delete(PREDICTIONS).where(PREDICTIONS.c.id.in_(old)))
        if old or lone:
            connection.execute(sqlalchemy.delete(FEEDBACK).where(FEEDBACK.c.id.in_([*old, *lone])))
    return len(old) + len(lone)
