"""The bundles of one server, by name: what is live, what may follow it, and what was before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from holotype.baseline import Baseline, open_baseline
from holotype.bundle import Bundle, open_bundle, resolve
from holotype.errors import BundleError, ConfigError, HolotypeError, ServerError
from holotype.serve.admission import Line
from holotype.serve.answers import News, Served
from holotype.serve.pool import Pool
from holotype.serve.settings import ServeSettings

__all__ = ["Fleet", "Model", "Version", "name_targets"]

_CHANGING = "another version is being made the live one"


@dataclass(eq=False)
class Version:
    """A bundle with the processes that answer with it, and what was normal when it was made.

    In the `background` they leave the processor to all others. `bundle` is the one they loaded; None before,
    or where another has taken its place.
    """

    name: str
    path: Path
    pool: Pool
    background: bool = False
    bundle: Bundle | None = None
    baseline: Baseline | None = None

    @property
    def served(self) -> Served | None:
        return self.pool.served


@dataclass(eq=False)
class Model:
    """A name and its versions; `candidate` is proven but answers nobody, `previous` is kept warm.

    `turns` counts how often another version became the live one, or the challenger went.
    """

    name: str
    live: Version
    challenger: Version | None = None
    candidate: Version | None = None
    previous: Version | None = None
    turns: int = 0
    busy: set[str] = field(default_factory=set)  # with changes that are under way

    @property
    def versions(self) -> Iterator[Version]:
        return (one for one in (self.live, self.challenger, self.candidate, self.previous) if one is not None)


class Fleet:
    """All models of a server; the first is the one that is meant where none is named.

    `listener` hears what the processes of a version say beside their answers.
    """

    def __init__(
        self,
        targets: dict[str, Path],
        *,
        settings: ServeSettings,
        line: Line,
        challenger: Path | None = None,
    ) -> None:
        self.listener: Callable[[Version, News], None] = lambda _, __: None
        self._settings = settings
        self._line = line
        self._others: set[Version] = set()  # being loaded, or on their way out
        self._leaving: set[asyncio.Task[None]] = set()
        self.models = {
            name: Model(name, self._version(name, resolve(path))) for name, path in targets.items()
        }
        if challenger is not None:
            self.default.challenger = self._version(
                self.default.name, resolve(challenger), background=settings.experiment.shadow
            )

    @property
    def default(self) -> Model:
        return next(iter(self.models.values()))

    @property
    def idle(self) -> int:
        """Processes of live versions with nothing to do."""
        return sum(model.live.pool.idle for model in self.models.values())

    async def load(self) -> None:
        """Load every version there is; `HolotypeError` says which bundle is wrong, and how."""
        versions = [version for model in self.models.values() for version in model.versions]
        await asyncio.gather(*(_load(version) for version in versions))
        model = self.default
        if model.challenger is not None:
            _check_classes(model, model.challenger)

    async def bring(self, name: str, target: Path) -> Served:
        """Load another bundle as the candidate of a model, in processes of its own.

        Its hashes, its golden outputs and its classes are checked on the way; if one fails, nothing changes.
        `ServerError` while another one is being loaded.
        """
        model = self.models[name]
        with _alone(model, "a bundle is being loaded"):
            version = await self._loaded(model, resolve(target))
            before, model.candidate = model.candidate, version
            self._retire(before)
        if version.served is None:
            raise AssertionError("loaded")
        return version.served

    async def promote(self, name: str, following: Version | None = None) -> Version:
        """Let `following` answer, by default the candidate, or else the challenger.

        The version that was live is kept to roll back to. `ConfigError` where there is nothing to promote,
        `ServerError` where it cannot answer or another change is going on: then nothing changes.
        """
        model = self.models[name]
        with _alone(model, _CHANGING):
            following = following or model.candidate or model.challenger
            if following is None or following not in (model.candidate, model.challenger):
                raise ConfigError("there is nothing to promote", where=name, fix="load a bundle first")
            chosen = await self._in_foreground(model, following) if following.background else following
            _check_alive(chosen)
            if following is model.candidate:
                model.candidate = None
            else:
                model.challenger = None
            if chosen is not following:
                self._retire(following)
            before, model.previous, model.live = model.previous, model.live, chosen
            model.turns += 1
            self._retire(before)
            return chosen

    def rollback(self, name: str) -> Version:
        """Let the version answer that was live before; at once, since its processes are still there.

        `ConfigError` where there is none, `ServerError` where it cannot answer or another change is going on.
        """
        model = self.models[name]
        with _alone(model, _CHANGING):
            if model.previous is None:
                raise ConfigError(
                    "there is nothing to roll back to", where=name, fix="promote something first"
                )
            _check_alive(model.previous)
            model.live, model.previous = model.previous, model.live
            model.turns += 1
            return model.live

    async def dismiss_challenger(self) -> None:
        """End the experiment for the champion; `ServerError` while another change is under way."""
        model = self.default
        with _alone(model, _CHANGING):
            gone, model.challenger = model.challenger, None
            model.turns += 1
            self._retire(gone)

    async def close(self) -> None:
        """End every process."""
        versions = {version for model in self.models.values() for version in model.versions} | self._others
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*(version.pool.close() for version in versions))

    async def _loaded(self, model: Model, path: Path) -> Version:
        """Another version of a model, ready and checked; where it is not, nothing is left of it."""
        version = self._version(model.name, path)
        self._others.add(version)
        try:
            await _load(version)
            _check_classes(model, version)
        except BaseException:
            await version.pool.close()
            raise
        finally:
            self._others.discard(version)
        return version

    async def _in_foreground(self, model: Model, version: Version) -> Version:
        """The same bundle in processes that give way to nobody, as those of the shadow do."""
        fresh = await self._loaded(model, version.path)
        if fresh.served is None or version.served is None or fresh.served.bundle != version.served.bundle:
            self._retire(fresh)
            raise BundleError("another bundle than the one on trial is there now", where=version.path)
        return fresh

    def _retire(self, version: Version | None) -> None:
        """Let a version that answers nobody from now on finish what it has, and end."""
        if version is None:
            return
        self._others.add(version)

        async def leave() -> None:
            await version.pool.drain()
            await version.pool.close()
            self._others.discard(version)

        task = asyncio.ensure_future(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _version(self, name: str, path: Path, *, background: bool = False) -> Version:
        # What runs in the shadow has a line of its own: it takes no place of those who wait for an answer.
        line = Line(places=self._settings.max_parts) if background else self._line
        pool = Pool(path, settings=self._settings, line=line, background=background)
        version = Version(name, path, pool, background=background)
        pool.listener = lambda news: self.listener(version, news)
        return version


@contextmanager
def _alone(model: Model, what: str) -> Iterator[None]:
    """One change of a kind at a time; who comes second is told, not kept waiting."""
    if what in model.busy:
        raise ServerError(f"{what} at this moment", where=model.name, fix="ask again when that is done")
    model.busy.add(what)
    try:
        yield
    finally:
        model.busy.discard(what)


def _check_alive(version: Version) -> None:
    if not version.pool.ready:
        raise ServerError(
            "no inference process of that version is running; the one that is live goes on",
            where=version.name,
            fix="wait until they are back, or load its bundle again",
        )


async def _load(version: Version) -> None:
    served = await version.pool.load()
    await asyncio.to_thread(_read_again, version, served)


def _read_again(version: Version, served: Served) -> None:
    """What the front itself needs of a bundle, if it is still the one that was loaded."""
    with suppress(HolotypeError):
        bundle = open_bundle(version.path)
        if bundle.hash == served.bundle:
            version.bundle = bundle
            version.baseline = open_baseline(bundle)


def name_targets(targets: list[str]) -> dict[str, Path]:
    """Names of bundles: `NAME=PATH`, or the run folder's name, or the bundle's.

    `ConfigError` where two have one name.
    """
    named: dict[str, Path] = {}
    for target in targets:
        name, equals, path = target.partition("=")
        if not equals:
            folder = Path(target).resolve()
            name, path = (folder.parent.name if folder.name == "best" else folder.name), target
        if name in named:
            raise ConfigError(f"two bundles are called {name}", where=target, fix=f"name one: OTHER={path}")
        named[name] = Path(path)
    return named


def _check_classes(model: Model, version: Version) -> None:
    live, served = model.live.served, version.served
    if live is not None and served is not None and set(live.classes) != set(served.classes):
        odd = sorted(set(live.classes) ^ set(served.classes))
        raise BundleError(f"has other classes than the live bundle: {', '.join(odd[:3])}", where=version.path)
