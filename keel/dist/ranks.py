"""One process among `world_size` that learn together; with one, every method is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share a model. `mesh` is there if there are several; tensors that are
    reduced lie on `device`."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """The rank that writes files."""
        return self.rank == 0

    def deal(self, count: int) -> tuple[int | None, ...]:
        """Which of `count` items are this rank's, in order; None fills up, so that all ranks have equally many."""
        rounds = -(-count // self.world_size)
        mine = (turn * self.world_size + self.rank for turn in range(rounds))
        return tuple(index if index < count else None for index in mine)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, the same bits on each."""
        return self._reduce(values, "sum")

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over ranks."""
        return self._reduce(values, "max")

    def _reduce(self, values: torch.Tensor, kind: str) -> torch.Tensor:
        if self.mesh is None:
            return values
        import torch.distributed as dist

        total = values.clone()
        operation = dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(total, op=operation, group=self.mesh.get_group())
        return total

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.mesh is not None:
            import torch.distributed as dist

            dist.barrier(group=self.mesh.get_group())

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `tensor` that lies here (its own storage); all of it if it is not sharded."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gather(self, local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The whole tensor of which `local` is this rank's part, laid out as `like`. Every rank must call it."""
        if not isinstance(like, DTensor):
            return local
        whole = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return whole.full_tensor()

    def part(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This rank's part of `whole`, laid out as `like`; nothing is sent. Undoes `gather`."""
        if not isinstance(like, DTensor):
            return whole
        dimension = _sharded_dimension(like.placements)
        chunks = torch.chunk(whole, self.world_size, dim=dimension)
        if self.rank < len(chunks):
            return chunks[self.rank].contiguous()
        return whole.narrow(dimension, 0, 0).contiguous()


def _sharded_dimension(placements: Sequence[object]) -> int:
    (placement,) = placements
    if not isinstance(placement, Shard):
        raise TypeError(f"parameter placement {placement}: only parameters sharded along one dimension are known")
    return placement.dim
