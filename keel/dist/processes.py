"""Starting ranks on this machine, and making sure that none outlives what it belongs to."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from keel.dist.ranks import Ranks

RENDEZVOUS_FILE = "rendezvous"
# A collective that takes longer than this has lost a rank.
COLLECTIVE_TIMEOUT_S = 1800


def join_ranks(rank: int, world_size: int, directory: str, num_threads: int, device: torch.device) -> Ranks:
    """Join the process group of `world_size` ranks that meet in `directory`: gloo on the CPU, NCCL on CUDA.

    `device` is this rank's own.

    `num_threads` is torch's number of CPU threads in this rank.
    """
    from datetime import timedelta

    torch.set_num_threads(num_threads)
    if sys.platform == "linux":
        # All ranks are on this machine; a host name that resolves to some other interface would make them wait.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{Path(directory).resolve() / RENDEZVOUS_FILE}"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before NCCL, which takes the current card
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    return Ranks(rank, world_size, init_device_mesh(device.type, (world_size,)), device)


def leave_ranks() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def die_with_parent() -> None:
    """End this process when its parent ends, even in the middle of a collective that will never complete."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="keel-parent-watch", daemon=True).start()
