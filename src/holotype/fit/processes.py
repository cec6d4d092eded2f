"""What several processes that train one model tell each other; with one process nothing is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed, nn

from holotype.errors import TrainingError
from holotype.fit.interrupt import say_the_last_word
from holotype.progress import quiet

__all__ = ["Processes", "join_processes", "losing_none"]

Value = TypeVar("Value")


class Processes:
    """The processes of this run, as `torchrun` or `accelerate launch` started them; mostly one."""

    def __init__(self, state: PartialState) -> None:
        self._state = state
        self.rank: int = state.process_index
        self.count: int = state.num_processes

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes files and speaks."""
        return self.rank == 0

    def part(self) -> None:
        """Leave the others, at the end of all."""
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process enters alone, the others when it has left: they find its caches filled."""
        if not self.first:
            self._state.wait_for_everyone()
        try:
            yield
        finally:  # also where the first one failed: the others then meet the same error, and can say so
            if self.first:
                self._state.wait_for_everyone()

    def from_first(self, value: Value) -> Value:
        """What the first process passed, in every process."""
        if self.count == 1:
            return value
        values = [value]
        broadcast_object_list(values, from_process=0)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """What every process passed, in order of rank, in every process."""
        return [value] if self.count == 1 else list(gather_object([value]))

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: torch.Tensor) -> torch.Tensor:
        """Add the gradients of all processes up, in place; also returns the sum of `numbers: float64[K]`.

        Once a step, after all of its parts: torch's DDP would do so after each, and cannot follow parameters
        that are unfrozen on the way. A process whose gradient is None counts as zero.
        """
        if self.count == 1:
            return numbers
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        numbers = numbers.to(flat.device)
        distributed.all_reduce(flat)
        distributed.all_reduce(numbers)
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
        return numbers

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's running statistics, in place."""
        if self.count == 1:
            return
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)

    def share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Every `count`-th of `rows`, another share in every process."""
        return rows[self.rank :: self.count]

    def join_shares(self, values: npt.NDArray[np.float32], *, total: int) -> npt.NDArray[np.float32]:
        """The values of all rows, in their order, from those of each process's `share`."""
        if self.count == 1:
            return values
        joined = np.empty((total, *values.shape[1:]), dtype=values.dtype)
        for rank, part in enumerate(self.gather(values)):
            joined[rank :: self.count] = part
        return joined


def join_processes(*, cpu: bool) -> Processes:
    """Meet the other processes of this run, if it was launched as several; only the first one speaks."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and cpu:
        # Without it accelerate says at length what it does by itself.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(torch.get_num_threads(), 1)))
    # While the first one reads or writes alone the others wait, for hours if need be. One that dies is
    # noticed by its connection, not by the time.
    waiting = {"timeout": timedelta(days=2)} if launched else {}
    processes = Processes(PartialState(cpu=cpu, **waiting))
    if not processes.first:
        quiet.set(True)
    return processes


@contextmanager
def losing_none(processes: Processes, *, resume: str) -> Iterator[None]:
    """Turn a lost connection to another process into one line that says how to go on."""
    try:
        yield
    except (distributed.DistBackendError, distributed.DistNetworkError, RuntimeError) as error:
        text = str(error).lower()
        lost = any(sign in text for sign in ("connection", "peer", "timed out", "socket", "gloo", "nccl"))
        if processes.count == 1 or not lost:
            raise
        say_the_last_word()
        raise TrainingError(
            f"process {processes.rank} of {processes.count} lost another one, which died or was killed",
            fix=f"look at its last message, then {resume}",
        ) from error
