"""What the rivals share: their arguments, what they say to the race that times them, and their best weights.

Nothing here imports holotype, so that a rival can run in an environment of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One run of a rival: `epochs` are planned by the race so that the schedule ends with the time given."""

    data: Path
    weights: Path | None
    seed: int
    epochs: int
    size: int
    amp: bool
    out: Path


def read_entry(description: str | None) -> Entry:
    """The command line of a rival."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", type=Path, help="class folder with train/ and maybe validation/ and test/")
    parser.add_argument("--weights", type=Path, help="ImageNet weights, a state dict with timm's names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where the rival offers it")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the images it gets wrong")
    return Entry(**vars(parser.parse_args()))


def pretrained(entry: Entry) -> Any:
    """The backbone that all race with, with its ImageNet weights and a fresh head."""
    import timm

    return timm.create_model(
        "tf_efficientnet_lite0",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(entry.weights)},
        num_classes=sum(folder.is_dir() for folder in (entry.data / "train").iterdir()),
    )


def say_ready() -> None:
    """Everything is built; the first epoch begins."""
    print("ready", flush=True)


class Best:
    """The weights of the epoch that was best on validation."""

    def __init__(self) -> None:
        self.accuracy = -1.0
        self.state: dict[str, Any] = {}

    def after_epoch(self, model: Any, accuracy: float) -> None:
        """Say what the epoch reached, and keep its weights when none was better."""
        print(f"epoch {accuracy:.6f}", flush=True)
        if accuracy > self.accuracy:
            self.accuracy, self.state = accuracy, copy.deepcopy(model.state_dict())


def write_wrong(entry: Entry, judged: dict[str, bool]) -> None:
    """Write how many images were judged and which of them wrongly, by their path below the data."""
    wrong = sorted(path for path, right in judged.items() if not right)
    entry.out.write_text(json.dumps({"judged": len(judged), "wrong": wrong}))


def below(entry: Entry, files: Sequence[Path | str]) -> list[str]:
    """Paths relative to the data."""
    return [Path(file).absolute().relative_to(entry.data.absolute()).as_posix() for file in files]
