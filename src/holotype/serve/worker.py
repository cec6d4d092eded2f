"""An inference process: takes an image from shared memory, answers over a pipe, and knows no network.

The front trusts nothing that comes back: orders and replies are JSON in bounded messages, never pickles, so
that an image which takes over a decoder still speaks only in labels and numbers.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import NoReturn

from holotype.errors import BundleError, HolotypeError, ImageError
from holotype.predictor import Predictor, load
from holotype.preprocess import Limits
from holotype.runtime import RuntimeName
from holotype.serve.answers import Answer, Choice, Reply, Served, failed

__all__ = ["Order", "order_bytes", "run"]


@dataclass(frozen=True)
class Order:
    """What an inference process is to load. With `bundle_hash` set, that very bundle and no other."""

    target: str
    runtime: RuntimeName
    threads: int
    max_pixels: int
    bundle_hash: str | None = None


def order_bytes(*, size: int, top: int) -> bytes:
    """The message that asks for the answer about the first `size` bytes of the slot."""
    return json.dumps({"size": size, "top": top}).encode()


def run(orders: Connection, slot_name: str, order: Order) -> None:
    """Main function of the process: load, say so, and answer until the front closes the pipe."""
    # A terminal or a service manager signals the whole group; only the front decides when work is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # what Pillow thinks of a stranger's image is no news to the operator
    slot = SharedMemory(name=slot_name)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the front is gone, so we go
        try:
            predictor = _load(order)
        except HolotypeError as error:
            _send_failure(orders, type(error).__name__, str(error))
            return
        except Exception as error:
            # Whatever a damaged file makes a parser raise is one line to the operator.
            _send_failure(orders, "ServerError", f"cannot load the bundle ({type(error).__name__}: {error})")
            return
        orders.send_bytes(_introduce(predictor).model_dump_json().encode())
        _answer(orders, slot, predictor)


def _load(order: Order) -> Predictor:
    predictor = load(
        order.target,
        runtime=order.runtime,
        threads=order.threads,
        limits=Limits(max_pixels=order.max_pixels),
    )
    if order.bundle_hash not in (None, predictor.bundle.hash):
        raise BundleError(
            "another bundle than the one being served has taken its place",
            where=order.target,
            fix="restart the server to serve it",
        )
    return predictor


def _introduce(predictor: Predictor) -> Served:
    names = ("holotype", "numpy", "pillow", predictor.runtime.name)
    versions = {name: importlib.metadata.version(name) for name in names}
    return Served(
        bundle=predictor.bundle.hash,
        classes=predictor.classes,
        preprocess=predictor.bundle.manifest.preprocess.model_dump(mode="json"),
        runtime=predictor.runtime.name,
        versions={"python": platform.python_version(), **versions},
    )


def _send_failure(orders: Connection, kind: str, message: str) -> None:
    orders.send_bytes(json.dumps({"kind": kind, "message": message}).encode())


def _answer(orders: Connection, slot: SharedMemory, predictor: Predictor) -> NoReturn:
    while True:
        asked = json.loads(orders.recv_bytes())
        assert slot.buf is not None
        image = bytes(slot.buf[: asked["size"]])
        reply = _reply(predictor, image, top=asked["top"])
        orders.send_bytes(reply.model_dump_json().encode())


def _reply(predictor: Predictor, image: bytes, *, top: int) -> Reply:
    try:
        prediction = predictor.predict(image, top=top)
    except ImageError as error:
        return failed(error.status, str(error))
    except MemoryError:
        return failed(503, "not enough memory for this image now")
    except Exception:
        # A runtime that fails on one image must not take the next one with it; the operator reads the log.
        traceback.print_exc(file=sys.stderr)
        return failed(500, "the model failed on this image")
    choices = tuple(Choice(label=one.label, probability=one.probability) for one in prediction.top)
    return Answer(label=choices[0].label, probability=choices[0].probability, top=choices)
