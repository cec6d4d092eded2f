"""An inference process: takes images from shared memory, answers over a pipe, and knows no network.

The front trusts nothing that comes back: orders and news are JSON in bounded messages, never pickles, so
that an image which takes over a decoder still speaks only in labels and numbers.
"""

from __future__ import annotations

import base64
import gc
import importlib.metadata
import io
import json
import math
import os
import platform
import signal
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

import numpy as np
from PIL import Image

from holotype.errors import BundleError, HolotypeError, ImageError, ServerError
from holotype.machine import available_cores
from holotype.predictor import Prediction, Predictor, load
from holotype.preprocess import Limits, Pixels
from holotype.progress import note
from holotype.runtime import Outputs, Precision, RuntimeName
from holotype.serve.answers import (
    Answer,
    Choice,
    Done,
    HeatMap,
    Moments,
    News,
    Outcome,
    Reply,
    Served,
    failed,
)
from holotype.serve.batches import Batcher, Order, Pace, Ready
from holotype.serve.heat import HeatMaps, open_heat_maps
from holotype.serve.notes import speak_json

__all__ = ["Assignment", "run"]

_LARGEST_BATCH = 8  # where nothing is set: beyond it no runtime becomes faster per image
_FAILED = failed(500, "the model failed on this image")
_MOST_AT_ONCE = 64  # orders that are read before the first of them is begun
_SUMMED = 64  # images between two messages about embeddings
_MOST_SHOWN_BYTES = 4 * 2**20  # of the pixels that the model saw, as base64
_NEWS_BYTES = 4 * 2**20  # of one message, roughly: the front reads none beyond four times that


@dataclass(frozen=True)
class Assignment:
    """What an inference process is to load, and how to run it.

    In the `background` it leaves the processor to all others. With `bundle_hash` set, no other bundle.
    """

    target: str
    runtime: RuntimeName
    precision: Precision
    threads: int | None
    max_pixels: int
    max_batch: int | None
    max_wait_ms: float | None
    deadline_seconds: float
    background: bool = False
    bundle_hash: str | None = None
    log: str = "none"


def run(pipe: Connection, memory_name: str, assignment: Assignment) -> None:
    """Main function of the process: load, say so, and answer until the front closes the pipe."""
    # A terminal or a service manager signals the whole group; only the front decides when work is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if assignment.background and hasattr(os, "nice"):
        os.nice(19)
    if assignment.log == "json":
        speak_json()
    warnings.simplefilter("ignore")  # what Pillow thinks of a stranger's image is no news to the operator
    memory = SharedMemory(name=memory_name)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the front is gone, so we go
        try:
            predictor = _load(assignment)
            max_batch, pace = _measure(predictor, assignment)
            heat = open_heat_maps(predictor)
        except HolotypeError as error:
            _send_failure(pipe, error)
            return
        except Exception as error:
            # Whatever a damaged file makes a parser raise is one line to the operator.
            told = f"cannot load the bundle ({type(error).__name__}: {error})"
            _send_failure(pipe, ServerError(told, where=assignment.target))
            return
        gc.freeze()  # what is loaded stays: the collector need not look at it again and again
        pipe.send_bytes(_introduce(predictor, max_batch, heat).model_dump_json().encode())
        threads = assignment.threads or available_cores()
        batcher = Batcher(predictor.read, threads=threads, pace=pace)
        work = _Work(pipe, batcher, predictor, heat, pace, _Sums())
        answering = threading.Thread(target=_answer, args=(work,), daemon=True)
        answering.start()
        try:
            _take_orders(pipe, memory, batcher)
        finally:
            batcher.close()
            answering.join()


def _load(assignment: Assignment) -> Predictor:
    predictor = load(
        assignment.target,
        runtime=assignment.runtime,
        precision=assignment.precision,
        threads=assignment.threads,
        limits=Limits(max_pixels=assignment.max_pixels),
    )
    if assignment.bundle_hash not in (None, predictor.bundle.hash):
        raise BundleError(
            "another bundle than the one being served has taken its place",
            where=assignment.target,
            fix="load it with /admin/models, or restart the server",
        )
    return predictor


def _measure(predictor: Predictor, assignment: Assignment) -> tuple[int, Pace]:
    """The largest batch allowed, and the pace as it is measured now, with a warm-up of every size."""
    spec = predictor.bundle.manifest.preprocess
    largest = assignment.max_batch or _LARGEST_BATCH
    sizes = [1 << power for power in range(largest.bit_length()) if 1 << power <= largest]
    seconds = {}
    for size in [*sizes, *({largest} - set(sizes))]:
        images = np.zeros((size, spec.height, spec.width, 3), dtype=np.uint8)
        predictor.runtime.run(images)
        seconds[size] = statistics.median(_timed(predictor, images) for _ in range(3))
    wait = None if assignment.max_wait_ms is None else assignment.max_wait_ms / 1e3
    pace = Pace(seconds, max_batch=assignment.max_batch, wait=wait, deadline=assignment.deadline_seconds)
    return largest, pace


def _timed(predictor: Predictor, images: Pixels) -> float:
    began = time.perf_counter()
    predictor.runtime.run(images)
    return time.perf_counter() - began


def _introduce(predictor: Predictor, max_batch: int, heat: HeatMaps) -> Served:
    names = ("holotype", "numpy", "pillow", predictor.runtime.name)
    versions = {name: importlib.metadata.version(name) for name in names}
    return Served(
        bundle=predictor.bundle.hash,
        classes=predictor.classes,
        preprocess=predictor.bundle.manifest.preprocess.model_dump(mode="json"),
        runtime=predictor.runtime.name,
        precision=predictor.bundle.manifest.precision,
        max_batch=max_batch,
        heat_maps=heat.method or heat.why_not,
        versions={"python": platform.python_version(), **versions},
    )


def _send_failure(pipe: Connection, error: HolotypeError) -> None:
    told = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    pipe.send_bytes(json.dumps(told).encode())


def _take_orders(pipe: Connection, memory: SharedMemory, batcher: Batcher) -> None:
    """Until the front closes the pipe, which is an EOFError, or asks to stop.

    What has come meanwhile is read first: of what is withdrawn in it, nothing may be begun.
    """
    while True:
        messages = [json.loads(pipe.recv_bytes())]
        while len(messages) < _MOST_AT_ONCE and "stop" not in messages[-1] and pipe.poll():
            messages.append(json.loads(pipe.recv_bytes()))
        gone = [number for asked in messages for number in asked.get("withdraw", ())]
        if gone:
            batcher.withdraw(gone)
        for asked in messages:
            if "stop" in asked:
                return
            if "withdraw" in asked:
                continue
            if memory.buf is None:
                raise AssertionError("the memory is closed")
            start, size = asked.pop("start"), asked.pop("size")
            order = Order(**asked)
            batcher.add(order, bytes(memory.buf[start : start + size]), wanted=order.number not in gone)


@dataclass(frozen=True)
class _Work:
    """What the thread that infers works with."""

    pipe: Connection
    batcher: Batcher
    predictor: Predictor
    heat: HeatMaps
    pace: Pace
    sums: _Sums


def _answer(work: _Work) -> None:
    """Infer batch after batch, and tell the front before and after each."""
    try:
        _answer_all(work)
    except BaseException:
        # Without this thread the process would take images and say nothing; its end is noticed at once.
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


def _answer_all(work: _Work) -> None:
    batcher = work.batcher
    with suppress(BrokenPipeError, ConnectionResetError):  # the front is gone, and the main thread goes too
        while (batch := batcher.take()) is not None:
            if not batch.images:
                unwanted = [Done(order=one.order.number, outcome=None) for one in batch.unwanted]
                broken = [Done(order=one.order.number, outcome=_excused(one)) for one in batch.broken]
                _tell(work.pipe, News(done=(*unwanted, *broken)))
                continue
            begun = tuple(one.order.number for one in batch.images if not one.order.executing)
            if begun:
                _tell(work.pipe, News(begun=begun))
            _infer(batch.images, work)


def _infer(batch: Sequence[Ready], work: _Work) -> None:
    """Answer a batch: first who asked for no heat map, which takes longer than all the rest."""
    outcomes = _outcomes(batch, work)
    plain: list[tuple[Ready, Outcome]] = []
    drawn: list[tuple[Ready, Outcome, Prediction]] = []
    for one, (outcome, prediction) in zip(batch, outcomes, strict=True):
        if one.order.explain and prediction is not None:
            drawn.append((one, outcome, prediction))
        else:
            plain.append((one, outcome))
    count, embeddings = work.sums.take()
    first, *more = _packed([Done(order=one.order.number, outcome=outcome) for one, outcome in plain])
    _tell(work.pipe, News(done=first, batch=len(batch), count=count, embeddings=embeddings))
    for done in more:
        _tell(work.pipe, News(done=done))
    for one, outcome, prediction in drawn:
        told = outcome.model_copy(update={"reply": _with_heat(one, outcome.reply, prediction, work.heat)})
        _tell(work.pipe, News(done=(Done(order=one.order.number, outcome=told),)))


def _tell(pipe: Connection, news: News) -> None:
    pipe.send_bytes(news.model_dump_json(exclude_defaults=True).encode())


def _packed(done: Sequence[Done]) -> list[tuple[Done, ...]]:
    """In messages that are not too long, one at least: a client can ask much about many images at once."""
    packs: list[list[Done]] = [[]]
    size = 0
    for one in done:
        weight = _weight(one)
        if packs[-1] and size + weight > _NEWS_BYTES:
            packs.append([])
            size = 0
        packs[-1].append(one)
        size += weight
    return [tuple(pack) for pack in packs]


def _weight(done: Done) -> int:
    """About how many bytes it is as JSON."""
    reply = None if done.outcome is None else done.outcome.reply
    if not isinstance(reply, Answer):
        return 1024
    return 1024 + len(reply.input or "") + sum(64 + 4 * len(choice.label) for choice in reply.top)


def _outcomes(batch: Sequence[Ready], work: _Work) -> list[tuple[Outcome, Prediction | None]]:
    """An outcome for each, in order, and what it is made of; one that fails costs the others nothing."""
    began = time.monotonic()
    images = [one.pixels for one in batch if one.pixels is not None]
    top = max(one.order.top for one in batch)
    predictions = _predict(images, work.predictor, work.sums, top=top)
    ended = time.monotonic()
    work.pace.learn(len(images), ended - began)
    outcomes: list[tuple[Outcome, Prediction | None]] = []
    for one, prediction in zip(batch, predictions, strict=True):
        moments = _moments(one, began, ended)
        reply = _FAILED if prediction is None else _reply(one, prediction)
        outcome = Outcome(reply=reply, moments=moments, brightness=one.brightness)
        outcomes.append((outcome, prediction if isinstance(reply, Answer) else None))
    return outcomes


def _excused(one: Ready) -> Outcome:
    """Of an image that could not be decoded: it is never inferred."""
    told = time.monotonic()
    return Outcome(reply=_excuse(one.error), moments=_moments(one, told, told))


def _moments(one: Ready, began: float, ended: float) -> Moments:
    """Of an image that was inferred between these two."""
    return Moments(
        queued=1e3 * (one.begun - one.order.admitted + began - one.ended),
        decoding=1e3 * (one.ended - one.begun),
        inferring=1e3 * (ended - began),
    )


def _predict(
    images: Sequence[Pixels], predictor: Predictor, sums: _Sums, *, top: int
) -> list[Prediction | None]:
    """All at once; where that fails, one by one, so that the one to blame takes nobody with it."""
    if not images:
        return []
    try:
        outputs = predictor.runtime.run(images[0][None] if len(images) == 1 else np.stack(images))
        judged = [*predictor.judge(outputs, names=[None] * len(images), top=top)]
    except Exception:
        if len(images) > 1:
            return [answer for image in images for answer in _predict([image], predictor, sums, top=top)]
        traceback.print_exc(file=sys.stderr)  # the operator reads the log, the client a sentence
        return [None]
    sums.add(outputs)
    return [*judged]


def _excuse(error: Exception | None) -> Reply:
    if isinstance(error, ImageError):
        return failed(error.status, str(error))
    if isinstance(error, MemoryError):
        return failed(503, "not enough memory for this image now")
    traceback.print_exception(error, file=sys.stderr)
    return failed(500, "the image could not be decoded")


def _reply(one: Ready, prediction: Prediction) -> Reply:
    if one.pixels is None:
        raise AssertionError("no answer without pixels")
    choices = prediction.top[: one.order.top]
    if not math.isfinite(choices[0].probability):
        note("the model gave an answer that is no number")
        return _FAILED
    shown = _png(one.pixels) if one.order.show_input else None
    if shown is not None and len(shown) > _MOST_SHOWN_BYTES:
        return failed(422, f"the pixels that the model saw are {len(shown):,} bytes; ask without show_input")
    return Answer(
        label=choices[0].label,
        probability=choices[0].probability,
        sure=prediction.sure,
        doubts=prediction.doubts,
        left_open=prediction.left_open,
        distance=prediction.distance,
        top=tuple(Choice(label=choice.label, probability=choice.probability) for choice in choices),
        input=shown,
    )


def _with_heat(one: Ready, reply: Reply, prediction: Prediction, heat: HeatMaps) -> Reply:
    """The answer with its heat map, or what keeps it from having one."""
    if one.pixels is None or not isinstance(reply, Answer):
        return reply
    if heat.method is None:
        return failed(501, f"no heat maps here: {heat.why_not}")
    try:
        grid = HeatMap(method=heat.method, grid=heat.draw(one.pixels, prediction.top[0].label))
    except HolotypeError as error:
        return failed(501, f"no heat maps here: {error.what}")
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return failed(500, "the heat map could not be drawn")
    return reply.model_copy(update={"heat_map": grid})


def _png(pixels: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


class _Sums:
    """Of embeddings, and of their squares, until they are told."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: np.ndarray | None = None

    def add(self, outputs: Outputs) -> None:
        values = outputs.embedding.astype(np.float64)
        sums = np.stack([values.sum(axis=0), (values**2).sum(axis=0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += len(values)

    def take(self) -> tuple[int, str | None]:
        """How many, and the sums as base64; (0, None) while they are too few to be worth a message."""
        if self._count < _SUMMED or self._sums is None:
            return 0, None
        count, told = self._count, base64.b64encode(self._sums.tobytes()).decode()
        self._count, self._sums = 0, None
        return count, told
