"""One process or several (`torchrun`): what the training loop has to know of the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class World:
    """This process among `size`, numbered `rank`."""

    rank: int = 0
    size: int = 1

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process; every process must ask."""
        return bool(self._sum([float(flag)])[0]) if self.size > 1 else flag

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum of each value over the processes; every process must give the same keys in the same order."""
        if self.size == 1:
            return dict(values)
        return dict(zip(values, self._sum(list(values.values())), strict=True))

    @staticmethod
    def _sum(values: list[float]) -> list[float]:
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(tensor)
        return [float(v) for v in tensor]


@contextmanager
def world(device: str) -> Iterator[World]:
    """The processes `torchrun` started (gloo on CPU, nccl on CUDA), or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
