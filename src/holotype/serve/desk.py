"""What the routes share: who answers, how many may come in, what is written down; and how that is done."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from holotype.baseline import Baseline
from holotype.drift import Drift, Seen
from holotype.experiment import ArmName
from holotype.serve.admission import Budget, Job, Line, Wish
from holotype.serve.answers import Answer, News, Outcome, Reply, Served, failed
from holotype.serve.fleet import Fleet, Model, Version
from holotype.serve.settings import ServeSettings
from holotype.serve.telemetry import Telemetry
from holotype.serve.turn import Turn, is_lost, is_to_blame

if TYPE_CHECKING:
    from holotype.records import Records
    from holotype.serve.trial import Trial

__all__ = ["RETRY", "Answered", "Desk", "line_is_full", "who_answered"]

RETRY = {"Retry-After": "1"}


@dataclass(frozen=True)
class Answered:
    """The outcomes of one request's images, in order, and who answered."""

    outcomes: list[Outcome]
    version: Version
    arm: ArmName


@dataclass(eq=False)
class Desk:
    """One server. `active` counts requests that were let in and have no response yet."""

    settings: ServeSettings
    line: Line
    budget: Budget
    telemetry: Telemetry
    fleet: Fleet | None = None
    trial: Trial | None = None
    records: Records | None = None
    watching: asyncio.Task[None] | None = None
    draining: bool = False
    active: int = 0
    _drifts: dict[str, Drift | None] = field(default_factory=dict)

    def model(self, name: str | None = None) -> tuple[Model, Served]:
        """A model that answers now; 404 where there is none of that name, 503 while it cannot answer."""
        if self.draining:
            raise HTTPException(503, "the server is shutting down", {**RETRY, "Connection": "close"})
        if self.fleet is None:
            raise HTTPException(503, "the model is being loaded", RETRY)
        found = self.fleet.default if name is None else self.fleet.models.get(name)
        if found is None:
            raise HTTPException(404, "there is no model of this name")
        served = found.live.served
        if served is None:
            raise HTTPException(503, "the model is being loaded", RETRY)
        if not found.live.pool.ready:
            raise HTTPException(503, "the inference processes are being restarted", RETRY)
        return found, served

    def classes(self) -> frozenset[str]:
        """Of all models here; 503 before any is loaded."""
        if self.fleet is None:
            raise HTTPException(503, "the model is being loaded", RETRY)
        served = (model.live.served for model in self.fleet.models.values())
        return frozenset(name for one in served if one is not None for name in one.classes)

    @property
    def full(self) -> bool:
        """Whether the first model answers, and the line has no place for one more image."""
        if self.fleet is None or self.draining:
            return False
        model = self.fleet.default
        return model.live.pool.ready > 0 and self._has_no_place(model)

    @contextmanager
    def letting_in(self, model: Model) -> Iterator[None]:
        """Count a request until it has its response; 429 before its body is read where there is no place."""
        if self._has_no_place(model):
            raise line_is_full()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def _has_no_place(self, model: Model) -> bool:
        return self.line.free(idle=model.live.pool.idle) < 1

    def drift(self, version: Version) -> Drift | None:
        """The window of a version; None where its bundle has no baseline."""
        served = version.served
        if served is None:
            return None
        if served.bundle not in self._drifts:
            models = [] if self.fleet is None else self.fleet.models.values()
            here = {one.served.bundle for model in models for one in model.versions if one.served is not None}
            # However often something else is loaded: what has gone is forgotten.
            self._drifts = {bundle: drift for bundle, drift in self._drifts.items() if bundle in here}
            self._drifts[served.bundle] = self._open_drift(version.baseline, served)
        return self._drifts[served.bundle]

    def hear(self, version: Version, news: News) -> None:
        """What the processes of a version say beside their answers."""
        if news.batch:
            self.telemetry.batches.labels(version.name).observe(news.batch)
        if news.embeddings is not None and (drift := self.drift(version)) is not None:
            drift.add_embeddings(news.count, news.embeddings)

    async def answer(
        self,
        images: Sequence[bytes | bytearray],
        *,
        model: Model,
        wish: Wish,
        key: str | None,
        receive: Receive,
    ) -> Answered:
        """Admit the images of a request and wait for their outcomes.

        `HTTPException`: 413 more than can ever wait, 429 no room now, 504 too late; `ClientDisconnect` where
        the client has gone: what was not begun never will be.
        """
        limit = self.settings.queue
        if len(images) > limit:
            raise HTTPException(413, f"{len(images)} images; no more than {limit} can wait here")
        unit = _unit(key, images) if self.records is not None else b""
        ids = [uuid.uuid4().hex for _ in images] if self.records is not None else []
        turn, version = self._assign(model, unit)
        began = time.monotonic()
        deadline = began + self.settings.deadline_seconds
        outcomes: list[Outcome] | None = None
        if turn.arm == "challenger":
            outcomes = await self._try_challenger(images, version, turn, ids=ids, wish=wish, receive=receive)
            if outcomes is None:
                # The experiment knows by now: that the champion stepped in is no merit of its arm.
                turn, version = self._outside(model, unit=unit), model.live
                began = time.monotonic()
        if outcomes is None:
            try:
                outcomes = await self._run(images, version, wish=wish, receive=receive, deadline=deadline)
            except HTTPException as error:
                if error.status_code == 504:
                    late = [failed(504, str(error.detail))] * len(images)
                    self._keep(late, turn, ids=ids, seconds=time.monotonic() - began)
                error.headers = {**(error.headers or {}), **who_answered(version, turn.arm)}
                raise
            replies = [outcome.reply for outcome in outcomes]
            self._keep(replies, turn, ids=ids, seconds=time.monotonic() - began)
        if ids:  # to name in feedback
            outcomes = [_named(outcome, identity) for outcome, identity in zip(outcomes, ids, strict=True)]
        self._note(outcomes, model, version, turn.arm)
        if self.trial is not None and model is self.trial.model:
            deadline = time.monotonic() + self.settings.deadline_seconds
            self.trial.shadow(images, outcomes, ids=ids, unit=unit, deadline=deadline)
        return Answered(outcomes, version, turn.arm)

    async def _try_challenger(
        self,
        images: Sequence[bytes | bytearray],
        version: Version,
        turn: Turn,
        *,
        ids: Sequence[str],
        wish: Wish,
        receive: Receive,
    ) -> list[Outcome] | None:
        """What is on trial may fail or be slow, and nobody who asks shall notice: None where it is."""
        if self.trial is None:
            raise AssertionError("a challenger without a trial")
        if not version.pool.ready:
            self.trial.missed(len(images))
            return None
        began = time.monotonic()
        try:
            # Half of the time that there is, so that the champion has the rest.
            deadline = began + self.settings.deadline_seconds / 2
            outcomes = await self._run(images, version, wish=wish, receive=receive, deadline=deadline)
        except HTTPException as error:
            if error.status_code != 504:
                raise
            outcomes = [Outcome(reply=failed(504, str(error.detail)))] * len(images)
        answered = zip(outcomes, ids, strict=True)
        self.trial.challenged(answered, turn, seconds=time.monotonic() - began)
        return None if any(is_lost(outcome.reply) for outcome in outcomes) else outcomes

    async def _run(
        self,
        images: Sequence[bytes | bytearray],
        version: Version,
        *,
        wish: Wish,
        receive: Receive,
        deadline: float,
    ) -> list[Outcome]:
        jobs = [Job(image=image, wish=wish, deadline=deadline) for image in images]
        if not self.line.admit(jobs, idle=version.pool.idle):
            raise line_is_full()
        version.pool.submit(jobs)
        return await _await_outcomes(jobs, version, receive=receive, deadline=deadline)

    def _assign(self, model: Model, unit: bytes) -> tuple[Turn, Version]:
        """Who answers a key: by the experiment even where the challenger has no process just now."""
        trial = self.trial
        if trial is None or trial.over or model is not trial.model:
            return self._outside(model, unit=unit), model.live
        arm = trial.assign(unit)
        return trial.turn(unit, arm=arm), trial.challenger if arm == "challenger" else model.live

    def _outside(self, model: Model, *, unit: bytes) -> Turn:
        """An answer that belongs to no experiment."""
        served = model.live.served
        return Turn(model.name, served.bundle if served else "", "champion", None, unit)

    def _keep(self, replies: Sequence[Reply], turn: Turn, *, ids: Sequence[str], seconds: float) -> None:
        """Write down what was answered, and in an experiment what failed."""
        if self.records is None:
            return
        for reply, identity in zip(replies, ids, strict=True):
            failing = turn.experiment is not None and not self.draining and is_to_blame(reply)
            if isinstance(reply, Answer) or failing:
                self.records.add("prediction", turn.row(identity, reply, milliseconds=1e3 * seconds))

    def _note(self, outcomes: Sequence[Outcome], model: Model, version: Version, arm: ArmName) -> None:
        """Count, and compare with the baseline."""
        drift, telemetry = self.drift(version), self.telemetry
        telemetry.images(len(outcomes), waiting=self.line.waiting)
        for outcome in outcomes:
            reply = outcome.reply
            if outcome.moments is not None:
                for stage, value in outcome.moments:
                    telemetry.stages.labels(stage).observe(value / 1e3)
            if not isinstance(reply, Answer):
                telemetry.failures.labels(model.name, str(reply.error.status)).inc()
                continue
            telemetry.answers.labels(model.name, arm, reply.label, str(reply.sure).lower()).inc()
            if drift is not None and outcome.brightness is not None and version.served is not None:
                label = version.served.classes.index(reply.label)
                drift.add(Seen(label, reply.probability, outcome.brightness, reply.distance))

    def _open_drift(self, baseline: Baseline | None, served: Served) -> Drift | None:
        if baseline is None:
            return None
        settings = self.settings.drift
        return Drift(baseline, classes=served.classes, window=settings.window, effect=settings.effect)


def line_is_full() -> HTTPException:
    return HTTPException(429, "too many images are waiting", RETRY)


def _unit(key: str | None, images: Sequence[bytes | bytearray]) -> bytes:
    """What is assigned to an arm: the key that the client gave, else the request's first image."""
    return key.encode() if key else hashlib.sha256(images[0]).digest()


def who_answered(version: Version, arm: ArmName) -> dict[str, str]:
    """Headers that name the bundle and the arm."""
    served = version.served
    return {"Holotype-Bundle": served.bundle if served else "", "Holotype-Arm": arm}


def _named(outcome: Outcome, identity: str) -> Outcome:
    """With an id; an answer only, since nothing else has a label."""
    if not isinstance(outcome.reply, Answer):
        return outcome
    return outcome.model_copy(update={"reply": outcome.reply.model_copy(update={"id": identity})})


async def _await_outcomes(
    jobs: Sequence[Job], version: Version, *, receive: Receive, deadline: float
) -> list[Outcome]:
    """Wait for every outcome; where time runs out or the client goes, what waits is withdrawn."""
    gone = asyncio.ensure_future(_until_disconnected(receive))
    waiting: set[asyncio.Future[Any]] = {job.reply for job in jobs}
    try:
        while waiting:
            left = deadline - time.monotonic()
            done, _ = await asyncio.wait(
                {*waiting, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED
            )
            waiting -= done
            if waiting and gone in done:
                raise ClientDisconnect
            if waiting and not done:
                raise HTTPException(504, "no answer within the deadline")
        return [job.reply.result() for job in jobs]
    finally:
        version.pool.withdraw(jobs)
        gone.cancel()


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
