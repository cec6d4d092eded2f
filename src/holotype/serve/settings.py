"""What a server may cost and how long it may take; nothing in it is unlimited."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holotype.experiment import Rule
from holotype.machine import available_cores
from holotype.preprocess import MOST_PIXELS, Limits
from holotype.runtime import Precision, RuntimeName

__all__ = ["MOST_PARTS", "DriftSettings", "RecordSettings", "ServeSettings"]

MOST_PARTS = 1000
"""Images of a request that no setting goes beyond."""

_MEBIBYTE = 2**20
_CLOSED = ConfigDict(frozen=True, extra="forbid")


class RecordSettings(BaseModel):
    """Where predictions and feedback are kept."""

    model_config = _CLOSED

    database: str | None = Field(
        None,
        description="an SQLAlchemy URL, such as sqlite:///answers.db or postgresql+psycopg://user@host/name;"
        " null: kept only for an experiment, in its own SQLite file",
    )
    journal: str | None = Field(
        None,
        description="folder of what is not in the database yet; null: in holotype's cache",
    )
    journal_bytes: int = Field(
        64 * _MEBIBYTE, ge=4096, description="largest journal; beyond: dropped, counted and shown"
    )
    keep_days: float | None = Field(
        90.0,
        gt=0,
        description="that answers and labels are kept, those of an experiment from its last answer on; null:"
        " for ever",
    )


class DriftSettings(BaseModel):
    """When recent images are no longer like those of validation."""

    model_config = _CLOSED

    window: int = Field(500, ge=50, le=100_000, description="latest images that are compared")
    effect: float = Field(
        0.2, gt=0, lt=1, description="least distance of two distributions that counts, 0 ... 1"
    )


class ServeSettings(BaseModel):
    """Address, processes and limits of one server. Keys are read from the environment: see the README."""

    model_config = _CLOSED

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens it to the network")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port and says which")
    workers: int = Field(1, ge=1, le=256, description="inference processes of each bundle")
    threads: int | None = Field(
        None, ge=1, description="threads of each process; by default the cores shared among the processes"
    )
    runtime: RuntimeName = Field(
        "auto", description="what runs the model; auto: the fastest as measured here"
    )
    precision: Precision = Field("auto", description="of what is not in integers; auto: as it was accepted")
    max_batch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="images inferred together; null: at most 8, as many as pay as measured",
    )
    max_wait_ms: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="that an image waits for others being decoded; null: as long as inferring one takes",
    )
    queue: int = Field(
        128, ge=1, le=100_000, description="images admitted and not yet executing; beyond: 429"
    )
    deadline_seconds: float = Field(
        10.0, gt=0, le=3600, description="from admission to the answer; an image past it never runs: 504"
    )
    max_body_bytes: int = Field(
        10 * _MEBIBYTE, ge=1, description="of one request, as sent and as decompressed; beyond: 413"
    )
    max_held_bytes: int = Field(
        512 * _MEBIBYTE, ge=1, description="of all requests being read or waiting; beyond: 429"
    )
    max_pixels: int = Field(
        Limits().max_pixels,
        ge=1,
        le=MOST_PIXELS,
        description="width x height of an image, from its header; beyond: 413",
    )
    max_head_bytes: int = Field(
        32 * 1024, ge=1024, le=_MEBIBYTE, description="request line and headers of one request; beyond: 431"
    )
    max_connections: int = Field(
        1024,
        ge=1,
        le=65_536,
        description="clients at a time; beyond: an idle one is closed, else 503 except for health",
    )
    max_parts: int = Field(32, ge=1, le=MOST_PARTS, description="parts of a multipart request; beyond: 413")
    upload_seconds: float = Field(
        15.0, gt=0, le=3600, description="for a client to send its request; beyond: 408 and closed"
    )
    download_seconds: float = Field(
        15.0, gt=0, le=3600, description="for a client to take its answer; beyond: closed"
    )
    stuck_seconds: float = Field(
        30.0, gt=0, le=3600, description="without progress before an inference process is replaced"
    )
    drain_seconds: float = Field(
        1.0, ge=0, le=20, description="least time between not being ready any more and closing the door"
    )
    log: Literal["json", "none"] = Field("json", description="a line on stderr for each request")
    records: RecordSettings = RecordSettings()
    experiment: Rule = Rule()
    drift: DriftSettings = DriftSettings()

    @model_validator(mode="after")
    def _one_body_must_fit(self) -> Self:
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(
                "max_held_bytes is less than max_body_bytes, so a full-size body would never be read"
            )
        return self

    @property
    def threads_each(self) -> int:
        """Threads of one inference process."""
        return self.threads or max(available_cores() // self.workers, 1)
