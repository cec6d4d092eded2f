"""The folder of a search: candidates as they are measured, so that an interrupted search goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holotype.bundle import Bundle, open_bundle, write_text
from holotype.compress.contract import Candidate, Compressed
from holotype.compress.search import Found
from holotype.compress.workshop import Made, Measured
from holotype.config import CompressConfig
from holotype.dataset import Dataset
from holotype.errors import BundleError, ConfigError
from holotype.machine import machine_name
from holotype.progress import note

__all__ = ["Folder", "check_folder", "open_folder"]

_STATE = "search.json"
_OUTCOME = "compress.json"


@dataclass(frozen=True)
class Folder:
    """Where a search is written; `question` is what its measurements depend on."""

    path: Path
    question: str

    @property
    def candidates(self) -> Path:
        """Their bundles, one folder each."""
        return self.path / "candidates"

    def keep(self, found: Found) -> None:
        """Write down all that was measured so far."""
        for one in found.measured:
            np.save(self._logits(one.made.method), one.logits)
        content = {
            "question": self.question,
            "done": found.done,
            "not_tried": found.not_tried,
            "measured": [one.candidate.model_dump(mode="json") for one in found.measured],
            "made": [_record(one.made) for one in found.measured],
        }
        write_text(self.path / _STATE, json.dumps(content, indent=1))

    def read(self) -> Found:
        """What an earlier search of the same question left; empty where there is none."""
        try:
            content = json.loads((self.path / _STATE).read_text())
        except OSError:
            return Found()
        measured: list[Measured] = []
        for row, record in zip(content["measured"], content["made"], strict=True):
            candidate = Candidate.model_validate(row)
            bundle = open_bundle(candidate.bundle)
            measured.append(
                Measured(_made(record, bundle), candidate, bundle, np.load(self._logits(candidate.method)))
            )
        if measured:
            note(f"going on: {', '.join(content['done']) or 'nothing'} was done before")
        return Found(measured, list(content["done"]), dict(content["not_tried"]))

    def finish(self, outcome: Compressed) -> None:
        """Write the outcome, which ends the search, and remove what only going on with it would need."""
        write_text(self.path / _OUTCOME, outcome.model_dump_json(indent=1))
        shutil.rmtree(self.candidates / "scratch", ignore_errors=True)

    def _logits(self, method: str) -> Path:
        return self.candidates / f"{method}.npy"


def check_folder(path: Path) -> None:
    """`ConfigError` where a search has ended in a folder, or it is something else."""
    if (path / _OUTCOME).exists():
        raise ConfigError("a search has ended here", where=path, fix="remove it, or choose another --out")
    if not (path / _STATE).exists() and path.exists() and any(path.iterdir()):
        raise ConfigError("is in the way", where=path, fix="choose another --out")


def open_folder(path: Path, source: Bundle, dataset: Dataset, config: CompressConfig) -> Folder:
    """A fresh folder, or that of a search for the same that was interrupted.

    `ConfigError` where a search has ended there, or another one was begun.
    """
    check_folder(path)
    question = _question(source, dataset, config)
    if (path / _STATE).exists() and _known_question(path / _STATE) != question:
        raise ConfigError(
            "another search was begun here: other bundle, images, settings or machine",
            where=path,
            fix="remove it, or choose another --out",
        )
    (path / "candidates").mkdir(parents=True, exist_ok=True)
    folder = Folder(path, question)
    if not (path / _STATE).exists():
        folder.keep(Found())  # stopped before anything is measured, the folder is known again
    return folder


def _known_question(file: Path) -> str | None:
    try:
        found = json.loads(file.read_text())["question"]
        return str(found)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BundleError(
            f"unreadable ({type(error).__name__})", where=file, fix="remove the folder, and search again"
        ) from error


def _question(source: Bundle, dataset: Dataset, config: CompressConfig) -> str:
    # The budget decides about candidates, it does not change them; but it changes which are tried.
    parts = [source.hash, dataset.root_hash, config.model_dump(mode="json"), machine_name()]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _record(made: Made) -> dict[str, Any]:
    parent = None if made.parent is None else str(made.parent.bundle.path)
    return {"method": made.method, "settings": dict(made.settings), "parent": parent}


def _made(record: dict[str, Any], bundle: Bundle) -> Made:
    """What was made, read back from its bundle; of what, is only asked when it is written."""
    files = {name: bundle.path / payload.path for name, payload in bundle.manifest.payloads.items()}
    return Made(
        record["method"],
        record["settings"],
        files,
        bundle.manifest.precision,
        preprocess=bundle.manifest.preprocess,
    )
