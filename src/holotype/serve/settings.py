"""What a server may cost and how long it may take; nothing in it is unlimited."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holotype.preprocess import Limits
from holotype.runtime import RuntimeName, available_cores

__all__ = ["ServeSettings"]

_MEBIBYTE = 2**20


class ServeSettings(BaseModel):
    """Address, processes and limits of one server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens it to the network")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free port and says which")
    workers: int = Field(1, ge=1, le=256, description="inference processes")
    threads: int | None = Field(
        None, ge=1, description="threads of each process; by default the cores shared among the processes"
    )
    runtime: RuntimeName = Field("auto", description="what runs the model")
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
        le=178_000_000,  # Pillow itself refuses more
        description="width x height of an image, from its header; beyond: 413",
    )
    max_parts: int = Field(32, ge=1, le=1000, description="parts of a multipart request; beyond: 413")
    upload_seconds: float = Field(
        15.0, gt=0, le=3600, description="for a client to send its request; beyond: 408 and closed"
    )
    stuck_seconds: float = Field(
        30.0, gt=0, le=3600, description="on one image before its inference process is replaced"
    )
    drain_seconds: float = Field(
        1.0, ge=0, le=20, description="least time between not being ready any more and closing the door"
    )

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
