"""An A/B test on a running server: which arm answers, the silent one in the shadow, and what follows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy
from prometheus_client import Counter

from holotype.errors import ConfigError, HolotypeError
from holotype.experiment import ArmName, Rule, Status, assign
from holotype.experiment_records import record_rule, status_of
from holotype.progress import note
from holotype.records import Records
from holotype.serve.admission import Job, Line, Wish
from holotype.serve.answers import Answer, Failed, Outcome
from holotype.serve.fleet import Fleet, Model, Version
from holotype.serve.telemetry import Telemetry
from holotype.serve.turn import Turn, is_lost, is_to_blame

__all__ = ["Trial"]

_LOOK_SECONDS = 5.0
_FRESH_SECONDS = 2.0


@dataclass(eq=False)
class Trial:
    """One experiment between two versions of `model`; over once either has another place, and for ever."""

    experiment: str
    rule: Rule
    model: Model
    champion: Version
    challenger: Version
    fleet: Fleet
    line: Line
    records: Records
    telemetry: Telemetry
    skipped: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _begun: bool = False
    _seen: tuple[float, Status] | None = None
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _turns: int = 0

    def __post_init__(self) -> None:
        self._turns = self.model.turns

    @property
    def over(self) -> bool:
        """Whoever promoted, rolled back or dismissed: these two are not compared any more."""
        return self.model.turns != self._turns

    def assign(self, key: bytes) -> ArmName:
        """Who answers a key; in shadow mode always the champion."""
        if self.rule.shadow:
            return "champion"
        return assign(key, experiment=self.experiment, share=self.rule.share)

    def turn(self, unit: bytes, *, arm: ArmName) -> Turn:
        """That an arm answers a key."""
        version = self.challenger if arm == "challenger" else self.champion
        served = version.served
        if served is None:
            raise AssertionError("an experiment begins with versions that are loaded")
        return Turn(self.model.name, served.bundle, arm, self.experiment, unit)

    def shadow(
        self,
        images: Sequence[bytes | bytearray],
        outcomes: Sequence[Outcome],
        *,
        ids: Sequence[str],
        unit: bytes,
        deadline: float,
    ) -> None:
        """Let the challenger answer the same images, where nobody waits; nobody is kept waiting for it.

        Those that no bundle could answer it need not see.
        """
        challenger = self.challenger
        if not self.rule.shadow or self.over:
            return
        asked = [
            (image, identity)
            for image, outcome, identity in zip(images, outcomes, ids, strict=True)
            if isinstance(outcome.reply, Answer) or is_lost(outcome.reply)
        ]
        if self.line.waiting or self.line.executing or not challenger.pool.idle:
            self.skipped += len(asked)
            return
        jobs = [Job(image=image, wish=Wish(top=1), deadline=deadline) for image, _ in asked]
        if not jobs:
            return
        # In a line of its own: it takes no place of those who wait for an answer.
        if not challenger.pool.line.admit(jobs, idle=challenger.pool.idle):
            self.skipped += len(jobs)
            return
        challenger.pool.submit(jobs)
        taking = self._take_down(jobs, [identity for _, identity in asked], unit=unit)
        task = asyncio.create_task(taking)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def challenged(self, outcomes: Iterable[tuple[Outcome, str]], turn: Turn, *, seconds: float) -> None:
        """Write down what the challenger made of images, and count what it failed on or was late with.

        Each comes with the id of its image. Whatever one lost process took with it is one key: how many were
        in flight says nothing of the bundle.
        """
        for outcome, identity in outcomes:
            reply = outcome.reply
            if isinstance(reply, Failed) and is_lost(reply):
                self._failures(reply.error.status).inc()
            # What fails while its processes are being ended is no fault of the challenger.
            if isinstance(reply, Answer) or (is_to_blame(reply) and not self.challenger.pool.closing):
                own = turn if outcome.lost is None else replace(turn, unit=outcome.lost.encode())
                self.records.add("prediction", own.row(identity, reply, milliseconds=1e3 * seconds))

    def missed(self, images: int) -> None:
        """The challenger had no process for these: counted, and not held against it image by image.

        An outage would be as many failures as there are clients, where the champion's is none. That its keys
        are answered by somebody else breaks the ratio, so that nothing is promoted in a crash loop.
        """
        self._failures(503).inc(images)

    def _failures(self, status: int) -> Counter:
        return self.telemetry.challenger_failures.labels(self.model.name, str(status))

    async def begin(self) -> None:
        """Write the rule down; where the database is not there yet, `watch` does.

        `ConfigError` where the experiment has begun under another rule.
        """
        engine = self.records.engine
        try:
            await asyncio.to_thread(record_rule, engine, self.experiment, self.rule)
        except sqlalchemy.exc.SQLAlchemyError:
            return
        self._begun = True

    async def look(self) -> Status:
        """What the database says, not more often than once in two seconds however many ask.

        `SQLAlchemyError` where it does not answer.
        """
        async with self._looking:
            now = time.monotonic()
            if self._seen is None or now - self._seen[0] > _FRESH_SECONDS:
                engine = self.records.engine
                status = await asyncio.to_thread(status_of, engine, self.experiment, self.rule)
                self._seen = now, status
            return self._seen[1]

    async def watch(self) -> None:
        """Look again and again, and do what the rule says once there is a verdict."""
        while not self.over:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._begin_or_end()
                if self._begun and self.rule.auto != "none":
                    await self._act(await self.look())
            except sqlalchemy.exc.SQLAlchemyError:
                continue  # the database is down, which is told elsewhere
            except HolotypeError as error:
                note(f"experiment {self.experiment}: {error}")

    async def _begin_or_end(self) -> None:
        """Where the database was down at the start, it may know of another rule."""
        if self._begun:
            return
        try:
            await self.begin()
        except ConfigError as error:
            await self.fleet.dismiss_challenger()
            note(f"{error}; the challenger is gone")

    async def _act(self, status: Status) -> None:
        if self.over:
            return  # somebody decided while the database was asked
        bad = "fails more often" if status.fails_more else "is worse" if status.verdict == "worse" else None
        if bad is not None and self.rule.auto in ("rollback", "both"):
            await self.fleet.dismiss_challenger()
            note(f"experiment {self.experiment}: the challenger {bad}, and is gone")
        good = status.verdict in ("better", "not worse") and not status.too_slow and not status.fails_more
        if good and self.rule.auto in ("promote", "both"):
            await self.fleet.promote(self.model.name, self.challenger)
            note(f"experiment {self.experiment}: the challenger is {status.verdict}, and is live now")

    async def _take_down(self, jobs: Sequence[Job], ids: Sequence[str], *, unit: bytes) -> None:
        """Write down the answers of the shadow; that it had no time for some is no failure of its."""
        began = time.monotonic()
        turn = self.turn(unit, arm="challenger")
        outcomes = await asyncio.gather(*(job.reply for job in jobs))
        if self.over:
            return
        seen = [
            (outcome, identity)
            for outcome, identity in zip(outcomes, ids, strict=True)
            if not (isinstance(outcome.reply, Failed) and outcome.reply.error.status == 504)
        ]
        self.skipped += len(outcomes) - len(seen)
        self.challenged(seen, turn, seconds=time.monotonic() - began)
