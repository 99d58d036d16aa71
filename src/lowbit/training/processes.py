"""Several processes that train one model together: each computes the gradient of its share of a step's windows.

The leaves are the same in all processes, because each starts from the same values and takes the same steps with the same
summed gradient. So nothing has to be wrapped, and the loop is the same for one process. What is trained are leaves that the
model computes with, not its own parameters; ``DistributedDataParallel`` would not see them.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_PATIENCE = timedelta(days=14)
"""How long processes wait for the first one, which quantizes alone; if it ends, they end at once."""


def launched() -> int:
    """How many processes were started together, this one included."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_available() else 1


def leads() -> bool:
    """Whether this process is the first of those that were started together: the one that writes and reports."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return launched() < 2 or int(os.environ.get("RANK", "0")) == 0


def _leave() -> None:
    """Ends the threads of the group, or the interpreter may abort when it ends before them."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """This process among all that train.

    Attributes:
        rank: its number from 0.
        count: of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """As a launcher (``accelerate launch``, ``torchrun``) started this process; alone where none did."""
        if launched() < 2:
            return cls()
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether it writes files and reports."""
        return self.rank == 0

    def share(self, windows: list[int]) -> list[int]:
        """The windows of a step that this process takes."""
        return windows[self.rank :: self.count]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Adds up each tensor over all processes, in place in each."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def meet(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def tell(self, what: Any) -> None:
        """Gives all other processes ``what``, which they get from :meth:`told`; for the first one."""
        if self.count > 1:
            dist.broadcast_object_list([what], src=0)

    def told(self) -> Any:
        """What the first process tells next."""
        heard = [None]
        dist.broadcast_object_list(heard, src=0)
        return heard[0]
