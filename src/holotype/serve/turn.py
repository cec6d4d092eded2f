"""Who was asked about the images of a request, and the row that the records keep of each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from holotype.experiment import ArmName, hashed
from holotype.serve.answers import Answer, Failed, Reply

__all__ = ["Turn", "is_lost", "is_to_blame"]


@dataclass(frozen=True)
class Turn:
    """An arm of an experiment that was asked, or a model outside of any; `unit` was assigned to it."""

    model: str
    bundle: str
    arm: ArmName
    experiment: str | None
    unit: bytes

    def row(self, identity: str, reply: Reply, *, milliseconds: float) -> dict[str, Any]:
        """Of one image; where the arm failed on it, without a label, and where it was late, with its time.

        How fast something fails says nothing of how fast it answers, so that time is left out.
        """
        answer = reply if isinstance(reply, Answer) else None
        late = isinstance(reply, Failed) and reply.error.status == 504
        return {
            "id": identity,
            "arm": self.arm,
            "experiment": self.experiment,
            "at": time.time(),
            "model": self.model,
            "bundle": self.bundle,
            "key": hashed(self.unit),
            "label": None if answer is None else answer.label,
            "probability": None if answer is None else answer.probability,
            "sure": None if answer is None else answer.sure,
            "milliseconds": milliseconds if answer is not None or late else None,
        }


def is_lost(reply: Reply) -> bool:
    """Whether another version may have an answer where this one has none."""
    return isinstance(reply, Failed) and reply.error.status in (500, 501, 503, 504)


def is_to_blame(reply: Reply) -> bool:
    """Whether the version that was asked is why: not the image, and not a heat map that it never promised."""
    return is_lost(reply) and not (isinstance(reply, Failed) and reply.error.status == 501)
