"""What a database holds of an A/B test: the rule it began under, and the answers and labels of its arms.

A prediction without a label is an image that the arm failed on or was late with.
"""

from __future__ import annotations

import json
import time
from typing import Any

import sqlalchemy
from sqlalchemy import case, func, select

from holotype.errors import ConfigError
from holotype.experiment import ArmStatus, Rule, Status, judge
from holotype.records import EXPERIMENTS, FEEDBACK, PREDICTIONS

__all__ = ["list_experiments", "read_rule", "record_rule", "status_of"]

_RECENT = 2000  # answers that latencies are of


def record_rule(engine: sqlalchemy.Engine, experiment: str, rule: Rule) -> None:
    """Write down the rule before the start; `ConfigError` where the experiment runs under another one."""
    EXPERIMENTS.metadata.create_all(engine)
    known = read_rule(engine, experiment)
    if known is None:
        row = {"id": experiment, "at": time.time(), "settings": rule.model_dump_json()}
        try:
            with engine.begin() as connection:
                connection.execute(sqlalchemy.insert(EXPERIMENTS), [row])
        except sqlalchemy.exc.IntegrityError:  # another server began it at this moment
            known = read_rule(engine, experiment)
    if known is not None and known != rule:
        changed = [name for name in Rule.model_fields if getattr(known, name) != getattr(rule, name)]
        raise ConfigError(
            f"this experiment has begun under another rule ({', '.join(changed)})",
            where=f"experiment {experiment}",
            fix="go on with that rule, or begin anew in another database",
        )


def read_rule(engine: sqlalchemy.Engine, experiment: str) -> Rule | None:
    """The rule an experiment began under; None where it has not begun."""
    with engine.connect() as connection:
        found = connection.execute(
            sqlalchemy.select(EXPERIMENTS.c.settings).where(EXPERIMENTS.c.id == experiment)
        ).scalar()
    return None if found is None else Rule.model_validate(json.loads(found))


def list_experiments(engine: sqlalchemy.Engine) -> list[str]:
    """Of a database, the latest first."""
    EXPERIMENTS.metadata.create_all(engine)
    with engine.connect() as connection:
        rows = connection.execute(sqlalchemy.select(EXPERIMENTS.c.id).order_by(EXPERIMENTS.c.at.desc()))
        return [str(row.id) for row in rows]


def status_of(engine: sqlalchemy.Engine, experiment: str, rule: Rule) -> Status:
    """Count what the database holds and say what may be said."""
    return judge(
        experiment,
        rule,
        champion=_arm(engine, experiment, "champion"),
        challenger=_arm(engine, experiment, "challenger"),
        pairs=_pairs(engine, experiment) if rule.shadow else None,
        failures=(_failures_of_both if rule.shadow else _failures)(engine, experiment),
    )


def _arm(engine: sqlalchemy.Engine, experiment: str, name: str) -> ArmStatus:
    mine = (PREDICTIONS.c.experiment == experiment) & (PREDICTIONS.c.arm == name)
    key = _key(PREDICTIONS)
    turn = func.row_number().over(partition_by=key, order_by=(PREDICTIONS.c.at, PREDICTIONS.c.id))
    told = (
        select(case((PREDICTIONS.c.label == FEEDBACK.c.label, 1), else_=0).label("right"), turn.label("turn"))
        .select_from(PREDICTIONS.join(FEEDBACK, PREDICTIONS.c.id == FEEDBACK.c.id))
        .where(mine)
        .subquery()
    )
    counts: Any = select(
        func.count(), func.count(PREDICTIONS.c.label), func.count(sqlalchemy.distinct(key))
    ).where(mine)
    labels: Any = select(func.count(), func.sum(told.c.right)).where(told.c.turn == 1)
    latest = select(PREDICTIONS.c.milliseconds).where(mine).order_by(PREDICTIONS.c.at.desc()).limit(_RECENT)
    with engine.connect() as connection:
        asked, answers, keys = connection.execute(counts).one()
        labelled, right = connection.execute(labels).one()
        times = sorted(float(row[0]) for row in connection.execute(latest) if row[0] is not None)
    p95 = times[min(int(0.95 * len(times)), len(times) - 1)] if times else None
    return ArmStatus(int(answers), int(asked - answers), int(keys), int(labelled), int(right or 0), p95)


def _pairs(engine: sqlalchemy.Engine, experiment: str) -> tuple[int, int, int, int]:
    """Of the keys with a labelled image that both arms answered: both right, one, the other, neither."""
    one, other = PREDICTIONS.alias(), PREDICTIONS.alias()
    key = _key(one)
    told = (
        select(
            (one.c.label == FEEDBACK.c.label).label("first"),
            (other.c.label == FEEDBACK.c.label).label("second"),
            func.row_number().over(partition_by=key, order_by=(one.c.at, one.c.id)).label("turn"),
        )
        .select_from(one.join(other, one.c.id == other.c.id).join(FEEDBACK, one.c.id == FEEDBACK.c.id))
        .where(one.c.experiment == experiment, one.c.arm == "champion", other.c.arm == "challenger")
        .subquery()
    )
    query = (
        select(told.c.first, told.c.second, func.count())
        .where(told.c.turn == 1)
        .group_by(told.c.first, told.c.second)
    )
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    with engine.connect() as connection:
        for champion, challenger, count in connection.execute(query):
            counts[bool(champion), bool(challenger)] += int(count)  # neither right nor wrong: it failed
    return counts[True, True], counts[True, False], counts[False, True], counts[False, False]


def _failures(engine: sqlalchemy.Engine, experiment: str) -> tuple[int, int]:
    """Keys of which an image failed, of the champion and of the challenger."""
    key = _key(PREDICTIONS)
    query = (
        select(PREDICTIONS.c.arm, func.count(sqlalchemy.distinct(key)))
        .where(PREDICTIONS.c.experiment == experiment, PREDICTIONS.c.label.is_(None))
        .group_by(PREDICTIONS.c.arm)
    )
    with engine.connect() as connection:
        found = {str(arm): int(count) for arm, count in connection.execute(query)}
    return found.get("champion", 0), found.get("challenger", 0)


def _failures_of_both(engine: sqlalchemy.Engine, experiment: str) -> tuple[int, int]:
    """Of the keys that both arms were asked about: those that only one failed, and only the other.

    By the keys of the other: what one of its lost processes took with it is one.
    """
    one, other = PREDICTIONS.alias(), PREDICTIONS.alias()
    first, second = (
        func.max(case((arm.c.label.is_(None), 1), else_=0)).label(name)
        for arm, name in ((one, "first"), (other, "second"))
    )
    told = (
        select(first, second)
        .select_from(one.join(other, one.c.id == other.c.id))
        .where(one.c.experiment == experiment, one.c.arm == "champion", other.c.arm == "challenger")
        .group_by(_key(other))
        .subquery()
    )
    query = select(told.c.first, told.c.second, func.count()).group_by(told.c.first, told.c.second)
    with engine.connect() as connection:
        counts = {(first, second): int(count) for first, second, count in connection.execute(query)}
    return counts.get((1, 0), 0), counts.get((0, 1), 0)


def _key(table: Any) -> Any:
    """What was assigned to an arm."""
    return func.coalesce(table.c.key, table.c.id)
