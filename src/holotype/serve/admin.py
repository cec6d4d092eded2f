"""Administration, behind its own key: load a bundle beside the live one, promote it, roll back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path
from pydantic import BaseModel, ConfigDict, Field

from holotype.errors import HolotypeError
from holotype.progress import warn
from holotype.serve.desk import Desk
from holotype.serve.fleet import Fleet, Model, Version
from holotype.serve.problems import documented

__all__ = ["admin_router", "without_paths"]

# In quotes, as the system names a file, else up to the next space.
_ABSOLUTE = re.compile(
    r"""(['"])(?:[A-Za-z]:)?[\\/](?!\1)[^'"]*\1|(?<![\w.:/\\-])(?:[A-Za-z]:)?[\\/]+\w[^\s'"),;:]*"""
)

Name = Annotated[str, Path(description="of a model")]


_VERSION = {"bundle": "0f3c…", "runtime": "openvino", "precision": "fp32", "processes": [4711]}
_MODEL = {
    "name": "shirts",
    "live": _VERSION,
    "challenger": {**_VERSION, "bundle": "c7d2…", "processes": [4712]},
    "candidate": {**_VERSION, "bundle": "7ab1…", "processes": [4713]},
    "previous": {**_VERSION, "bundle": "e910…", "processes": [4714]},
}


class _Load(BaseModel):
    """Which bundle to load."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        None, description="of the model that it may become; by default the first", examples=["shirts"]
    )
    path: str = Field(
        pattern=r"^[^\x00]+$",
        description="a bundle or run folder on the server",
        examples=["/srv/holotype/next"],
    )


def admin_router(desk: Desk) -> APIRouter:
    """The routes that change what is served."""
    router = APIRouter(prefix="/admin/models", tags=["administration"])
    refusals = documented(400, 401, 403, 404, 409, 422, 503)
    one = {200: {"content": {"application/json": {"example": _MODEL}}}, **refusals}
    all_of_them = {200: {"content": {"application/json": {"example": {"models": [_MODEL]}}}}, **refusals}

    @router.get("", responses=all_of_them)
    async def models() -> dict[str, Any]:
        """Every model with its versions."""
        return {"models": [_described(model) for model in _fleet(desk).models.values()]}

    @router.post("", responses=one)
    async def load(asked: _Load) -> dict[str, Any]:
        """Load a bundle in processes of its own and prove it: hashes, golden outputs, classes."""
        fleet = _fleet(desk)
        model = _model(fleet, asked.name or fleet.default.name)
        with _refusals("refused: ", FilePath(asked.path)):
            await fleet.bring(model.name, FilePath(asked.path))
        return _described(model)

    @router.post("/{name}/promote", responses=one)
    async def promote(name: Name) -> dict[str, Any]:
        """Let the loaded bundle, or else the challenger, answer from now on."""
        fleet = _fleet(desk)
        model = _model(fleet, name)
        with _refusals("", *(version.path for version in model.versions)):
            await fleet.promote(name)
        return _described(model)

    @router.post("/{name}/rollback", responses=one)
    async def rollback(name: Name) -> dict[str, Any]:
        """Let the bundle that was live before answer again, at once."""
        fleet = _fleet(desk)
        model = _model(fleet, name)
        with _refusals(""):
            fleet.rollback(name)
        return _described(model)

    return router


@contextmanager
def _refusals(beginning: str, *bundles: FilePath) -> Iterator[None]:
    """What is wrong goes to who asked, without where on this machine; that goes to the log."""
    try:
        yield
    except HolotypeError as error:
        warn(f"administration: {error}")
        raise HTTPException(409, beginning + without_paths(error.what, *bundles)) from error


def without_paths(text: str, *bundles: FilePath) -> str:
    """A message in which no place on this machine is left: neither of these bundles nor any absolute path.

    A relative path of one part is a word like any other, and whoever gave it knows it.
    """
    known = {str(path) for path in bundles if len(path.parts) > 1}
    known |= {str(path.absolute()) for path in bundles} | {os.path.realpath(path) for path in bundles}
    for path in sorted(known, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./\\-]){re.escape(path)}(?![\w-])[^\s'\"),;:]*", "the bundle", text)
    return _ABSOLUTE.sub("a file", text)


def _fleet(desk: Desk) -> Fleet:
    if desk.fleet is None or desk.draining:
        raise HTTPException(503, "the server is starting or shutting down")
    return desk.fleet


def _model(fleet: Fleet, name: str) -> Model:
    if name not in fleet.models:
        raise HTTPException(404, "there is no model of this name")
    return fleet.models[name]


def _described(model: Model) -> dict[str, Any]:
    versions = {
        "live": model.live,
        "challenger": model.challenger,
        "candidate": model.candidate,
        "previous": model.previous,
    }
    return {"name": model.name, **{role: _version(one) for role, one in versions.items()}}


def _version(version: Version | None) -> dict[str, Any] | None:
    if version is None or version.served is None:
        return None
    served = version.served
    return {
        "bundle": served.bundle,
        "runtime": served.runtime,
        "precision": served.precision,
        "processes": version.pool.processes,
    }
