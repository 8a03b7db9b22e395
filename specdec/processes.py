"""The processes that `accelerate launch` or `torchrun` started: which of them this one is, and what they hand in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from specdec.errors import UsageError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """One of ``count`` processes.

    Attributes:
        rank: 0 to count - 1; the first alone prints results and writes what belongs to all.
        count: on all machines together.
        local: its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def place(self, device: str) -> str:
        """This process's own device for a ``--device`` of auto, cpu or cuda: GPU i for the i-th on a machine.

        Raises:
            UsageError: there are fewer GPUs than processes.
        """
        if self.count == 1 or device == "cpu":
            return device
        import torch

        if not torch.cuda.is_available():
            return device
        if self.local >= torch.cuda.device_count():
            raise UsageError(
                f"process {self.local + 1} of this machine has no GPU ({torch.cuda.device_count()} here); start as "
                "many processes as there are GPUs, or give --device cpu"
            )
        torch.cuda.set_device(self.local)  # kernels go to the current device, whatever their tensors say
        return f"cuda:{self.local}"


ALONE = Process()


def this_process() -> Process:
    """What the launcher says in RANK, WORLD_SIZE and LOCAL_RANK; one process without them.

    Raises:
        UsageError: they contradict each other.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    rank, count = int(os.environ.get("RANK", local)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < count:
        raise UsageError(
            f"RANK={rank}: it must be below WORLD_SIZE={count}; start with `accelerate launch` or torchrun"
        )
    return Process(rank, count, local)


def alone(command: str) -> None:
    """Raise UsageError unless there is one process: ``command`` would do the same work in each."""
    count = this_process().count
    if count > 1:
        raise UsageError(f"{command} runs in one process, not {count}; start it without a launcher")


@contextmanager
def gathering(process: Process) -> Iterator[Callable[[T], list[T]]]:
    """Joins the processes; what it yields takes an object of each and, once all are there, gives them to the first.

    They come in a list, by rank; that of the other processes is empty. Objects are pickled and go over gloo, so GPUs
    are left alone.

    Raises:
        UsageError: another process has ended without handing in.
    """
    if process.count == 1:
        yield lambda value: [value]
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=timedelta(minutes=5))
        group = dist.new_group(backend="gloo", timeout=timedelta(days=365))  # shares may take differently long
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the {process.count} processes do not find each other: {first_line(error)}") from error

    def gather(value: T) -> list[T]:
        found: list[T | None] | None = [None] * process.count if process.first else None
        try:
            dist.gather_object(value, found, group=group)
        except RuntimeError as error:
            raise UsageError(
                f"another of the {process.count} processes ended early; its own message says why. Start again"
            ) from error
        return found or []  # type: ignore[return-value]

    try:
        yield gather
    finally:
        dist.destroy_process_group()
