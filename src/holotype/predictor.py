"""A bundle that answers: bytes, files or folders in, `Prediction`s out, decoding beside inference."""

from __future__ import annotations

import errno
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.baseline import Baseline, distances, open_baseline
from holotype.bundle import Bundle, open_bundle
from holotype.errors import BundleError, ImageError
from holotype.machine import available_cores
from holotype.policy import Doubt, Judgement, judge, probabilities
from holotype.preprocess import Limits, Pixels, read_pixels
from holotype.runtime import (
    Outputs,
    Precision,
    Runtime,
    RuntimeName,
    choose,
    open_runtime,
    verify_golden,
)

__all__ = ["Choice", "Failure", "Prediction", "Predictor", "Source", "load"]

Source = str | Path | bytes
"""A file name, or the bytes of an image."""


@dataclass(frozen=True)
class Choice:
    """A class and its probability in [0, 1]."""

    label: str
    probability: float


@dataclass(frozen=True)
class Failure:
    """Why there is no answer: an HTTP status (400, 413, 415, 422; 404 for a missing file) and a message."""

    status: int
    message: str


@dataclass(frozen=True)
class Prediction:
    """The answer for one image. `top` is sorted, most probable first, and empty where `error` is set.

    `doubts` say why it is not sure, by the bundle's policy; `left_open` the classes that conformal prediction
    leaves open; `distance` how far the image is from those that were learned, about 1 for one like them.
    """

    path: str | None
    top: tuple[Choice, ...]
    error: Failure | None = None
    doubts: tuple[Doubt, ...] = ()
    left_open: tuple[str, ...] | None = None
    distance: float | None = None

    @property
    def sure(self) -> bool:
        """Whether the policy stands by the label."""
        return bool(self.top) and not self.doubts

    @property
    def label(self) -> str | None:
        return self.top[0].label if self.top else None

    @property
    def probability(self) -> float | None:
        return self.top[0].probability if self.top else None


@dataclass(frozen=True)
class Predictor:
    """An opened bundle in a runtime. Made by `load`; safe to use from one thread at a time."""

    bundle: Bundle
    runtime: Runtime
    limits: Limits = field(default_factory=Limits)
    batch_size: int = 16
    baseline: Baseline | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.bundle.manifest.classes

    def predict(self, source: Source, *, top: int = 5) -> Prediction:
        """The answer for one image; an unreadable one raises its `ImageError`."""
        pixels = self.read(source)
        name = None if isinstance(source, bytes) else str(source)
        return self.answer(pixels[None], names=[name], top=top)[0]

    def predict_many(self, sources: Iterable[Source], *, top: int = 5) -> Iterator[Prediction]:
        """Answers in the order of `sources`, decoded in threads while the previous batch is inferred.

        An unreadable image becomes a `Prediction` with its `error`; it never stops the others.
        """
        with ThreadPoolExecutor(available_cores(), thread_name_prefix="decode") as pool:
            waiting: deque[tuple[str | None, Future[Pixels | Failure]]] = deque()
            feed = iter(sources)
            while True:
                # Two batches ahead: one being inferred, one being decoded.
                for source in itertools.islice(feed, 2 * self.batch_size - len(waiting)):
                    name = None if isinstance(source, bytes) else str(source)
                    waiting.append((name, pool.submit(self._attempt, source)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                yield from self._finish(batch, top=top)

    def answer(self, images: Pixels, *, names: Sequence[str | None], top: int = 5) -> list[Prediction]:
        """What the bundle's policy makes of pixels `uint8[N, H, W, 3]`."""
        return self.judge(self.runtime.run(images), names=names, top=top)

    def judge(self, outputs: Outputs, *, names: Sequence[str | None], top: int = 5) -> list[Prediction]:
        """What the bundle's policy makes of what the runtime gave for N images."""
        judged = judge(
            outputs.logits,
            policy=self.bundle.manifest.policy,
            classes=self.classes,
            distances=None if self.baseline is None else distances(outputs.embedding, self.baseline),
        )
        return [self._prediction(one, name, top=top) for one, name in zip(judged, names, strict=True)]

    def probabilities(self, images: Pixels) -> npt.NDArray[np.float64]:
        """`float64[N, C]` for pixels `uint8[N, H, W, 3]`, with the bundle's policy applied."""
        return probabilities(self.runtime.run(images).logits, policy=self.bundle.manifest.policy)

    def read(self, source: Source) -> Pixels:
        """What the model sees of an image: `uint8[H, W, 3]`; an `ImageError` or OSError where it is none."""
        data = source if isinstance(source, bytes) else _bytes_of(source)
        return read_pixels(data, spec=self.bundle.manifest.preprocess, limits=self.limits)

    def _attempt(self, source: Source) -> Pixels | Failure:
        try:
            return self.read(source)
        except ImageError as error:
            return Failure(error.status, str(error))
        except OSError as error:
            return Failure(404, f"cannot be read ({error.strerror})")

    def _finish(
        self, batch: Sequence[tuple[str | None, Future[Pixels | Failure]]], *, top: int
    ) -> Iterator[Prediction]:
        results = [(name, future.result()) for name, future in batch]
        readable = [(name, pixels) for name, pixels in results if not isinstance(pixels, Failure)]
        answers: Iterator[Prediction] = iter(())
        if readable:
            images = np.stack([pixels for _, pixels in readable])
            answers = iter(self.answer(images, names=[name for name, _ in readable], top=top))
        for name, result in results:
            yield Prediction(name, (), result) if isinstance(result, Failure) else next(answers)

    def _prediction(self, judged: Judgement, name: str | None, *, top: int) -> Prediction:
        chances, left = judged.probabilities, judged.left_open
        best = np.argsort(-chances, kind="stable")[:top]
        return Prediction(
            name,
            tuple(Choice(self.classes[i], float(chances[i])) for i in best),
            doubts=judged.doubts,
            left_open=None if left is None else tuple(self.classes[i] for i in left),
            distance=judged.distance,
        )


def _bytes_of(file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except ValueError as error:  # NUL, or what UTF-8 cannot hold: Python asks no file system for it
        raise OSError(errno.EINVAL, "no file can be called so") from error


def load(
    target: Path | str,
    *,
    runtime: RuntimeName = "auto",
    precision: Precision = "auto",
    device: str = "auto",
    threads: int | None = None,
    limits: Limits | None = None,
) -> Predictor:
    """Open a bundle or run folder for prediction: hashes and golden outputs are checked first."""
    bundle = open_bundle(target)
    if len(set(bundle.manifest.classes)) != len(bundle.manifest.classes):
        raise BundleError("lists a class twice", where=bundle.path)
    opened = open_runtime(bundle, name=runtime, precision=precision, device=device, threads=threads)
    chosen = choose(bundle, name=runtime, precision=precision)
    verify_golden(opened, bundle, precision=chosen.precision)
    return Predictor(bundle=bundle, runtime=opened, limits=limits or Limits(), baseline=open_baseline(bundle))
