"""FSDP2: parameters, gradients and optimizer state split over ranks, one group per layer and one around all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def shard_policy(policy: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard `policy` in place over `mesh` (one dimension); each of `layers` is gathered only while it runs.

    What is outside the layers (embedding, last norm, head) is the root's group. The root's forward must be called
    through the module itself, once per micro-batch: a trunk and a head called apart would meet unsharded and sharded
    tensors. Gradients come out averaged over ranks.
    """
    # Gradients of bfloat16 parameters are added up over ranks in float32, as they are over micro-batches.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    # The root too: a pass without gradient must not leave whole parameters in the place of the shards.
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
