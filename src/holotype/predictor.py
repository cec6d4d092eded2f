"""A bundle that answers: bytes, files or folders in, `Prediction`s out, decoding beside inference."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from holotype.bundle import Bundle, open_bundle
from holotype.errors import BundleError, ImageError
from holotype.policy import probabilities
from holotype.preprocess import Limits, Pixels, read_pixels
from holotype.runtime import Runtime, RuntimeName, available_cores, open_runtime, verify_golden

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
    """The answer for one image. `top` is sorted, most probable first, and empty where `error` is set."""

    path: str | None
    top: tuple[Choice, ...]
    error: Failure | None = None

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

    @property
    def classes(self) -> tuple[str, ...]:
        return self.bundle.manifest.classes

    def predict(self, source: Source, *, top: int = 5) -> Prediction:
        """The answer for one image; an unreadable one raises its `ImageError`."""
        pixels = self.read(source)
        name = None if isinstance(source, bytes) else str(source)
        return self._answers(self.probabilities(pixels[None]), [name], top=top)[0]

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

    def probabilities(self, images: Pixels) -> npt.NDArray[np.float64]:
        """`float64[N, C]` for pixels `uint8[N, H, W, 3]`, with the bundle's policy applied."""
        return probabilities(self.runtime.run(images).logits, policy=self.bundle.manifest.policy)

    def read(self, source: Source) -> Pixels:
        """What the model sees of an image: `uint8[H, W, 3]`."""
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
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
            answers = iter(self._answers(self.probabilities(images), [name for name, _ in readable], top=top))
        for name, result in results:
            yield Prediction(name, (), result) if isinstance(result, Failure) else next(answers)

    def _answers(
        self, chances: npt.NDArray[np.float64], names: Sequence[str | None], *, top: int
    ) -> list[Prediction]:
        order = np.argsort(-chances, axis=1, kind="stable")[:, :top]
        return [
            Prediction(name, tuple(Choice(self.classes[i], float(row[i])) for i in best))
            for name, row, best in zip(names, chances, order, strict=True)
        ]


def load(
    target: Path | str,
    *,
    runtime: RuntimeName = "auto",
    device: str = "auto",
    threads: int | None = None,
    limits: Limits | None = None,
) -> Predictor:
    """Open a bundle or run folder for prediction: hashes and golden outputs are checked first."""
    bundle = open_bundle(target)
    if len(set(bundle.manifest.classes)) != len(bundle.manifest.classes):
        raise BundleError("lists a class twice", where=bundle.path)
    opened = open_runtime(bundle, name=runtime, device=device, threads=threads)
    verify_golden(opened, bundle)
    return Predictor(bundle=bundle, runtime=opened, limits=limits or Limits())
