"""A broadcast from the learner to those who sample: rank 0 sends, the others receive. torch alone, both sides.

The learner opens a store on its machine, under whose key lies the manifest: what comes, in order, and for whom. Groups
are made for one transfer and forgotten: who died and came back simply joins the next. The store listens on the
given host alone, and its keys begin with the address's token: who was not told it neither reads nor answers.
"""

from __future__ import annotations

import json
import secrets
import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MANIFEST, ANSWER, READY, DONE = "manifest", "answer", "ready", "done"


class TransferError(RuntimeError):
    """A transfer that was refused before anything was sent."""


class RefusedError(TransferError):
    """The other end said no."""


@dataclass(frozen=True)
class Address:
    """Where the store is, how many receive, and over what ("gloo" or "nccl")."""

    backend: str
    host: str
    port: int
    num_receivers: int
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def as_text(self) -> str:
        return json.dumps([self.backend, self.host, self.port, self.num_receivers, self.token])

    @classmethod
    def from_text(cls, text: str) -> Address:
        backend, host, port, number, token = json.loads(text)
        return cls(str(backend), str(host), int(port), int(number), str(token))


def send(address: Address, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], timeout_s: float) -> None:
    """Broadcast `tensors` to `address.num_receivers` receivers, `header` (JSON values) with them.

    Returns when all have said that they have them. Raises RefusedError if one refuses (nothing was sent then), and
    RuntimeError if one is missing or lost after `timeout_s`.
    """
    store = _store(address, timeout_s, master=True)
    try:
        _send(address, store, tensors, header, timeout_s)
    except RefusedError:
        raise
    except BaseException as error:
        # An error keeps what its frames held: the receivers would go on waiting for a store that stands.
        traceback.clear_frames(error.__traceback__)
        del store
        raise


def _send(
    address: Address, store: Any, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], timeout_s: float
) -> None:
    items = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    store.set(MANIFEST, json.dumps({"tensors": items, "header": dict(header)}))
    ranks = range(1, address.num_receivers + 1)
    # One after the other, so that a refusal by any is seen while others are still on their way.
    for rank in ranks:
        answer = store.get(f"{ANSWER}/{rank}").decode()
        if answer != READY:
            raise RefusedError(answer)
    group = _group(address, store, 0, timeout_s)
    device = _device(address)
    for tensor in tensors.values():
        _broadcast(group, tensor.detach().to(device).contiguous())
    store.wait([f"{DONE}/{rank}" for rank in ranks], timedelta(seconds=timeout_s))


def call_off(address: Address, reason: str, timeout_s: float) -> None:
    """Answer in the receivers' place that nobody will receive, so that the sender need not wait for them."""
    store = _store(address, timeout_s, master=False)
    for rank in range(1, address.num_receivers + 1):
        store.set(f"{ANSWER}/{rank}", f"called off: {reason}")


@contextmanager
def called_off(address: Address, reason: str, timeout_s: float) -> Iterator[None]:
    """Stand in the sender's place and tell whoever comes to receive that nothing will be sent.

    Raises TransferError if the sender's own store still stands.
    """
    store = _store(address, timeout_s, master=True)
    store.set(MANIFEST, json.dumps({"called off": reason}))
    yield


class Receiver:
    """One end of a transfer: read the manifest, check it, then receive or refuse."""

    def __init__(self, address: Address, rank: int, timeout_s: float) -> None:
        """`rank` counts receivers from 1. Raises RuntimeError if the sender is not there within `timeout_s`,
        RefusedError if it has called off."""
        self._address, self._rank, self._timeout_s = address, rank, timeout_s
        self._store = _store(address, timeout_s, master=False)
        manifest = json.loads(self._store.get(MANIFEST))
        if "called off" in manifest:
            raise RefusedError(f"the sender failed: {manifest['called off']}")
        self.header: dict[str, Any] = manifest["header"]
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (getattr(torch, dtype), tuple(shape)) for name, dtype, shape in manifest["tensors"]
        }

    def refuse(self, reason: str) -> None:
        """Say that these tensors are not wanted: the sender stops before it sends anything."""
        self._store.set(f"{ANSWER}/{self._rank}", f"refused: {reason}")

    def receive(self, *, into_host: bool = True) -> dict[str, torch.Tensor]:
        """Everything, in memory of its own: a sender that dies on the way leaves the model as it was."""
        self._store.set(f"{ANSWER}/{self._rank}", READY)
        group = _group(self._address, self._store, self._rank, self._timeout_s)
        device = _device(self._address)
        result = {}
        for name, (dtype, shape) in self.tensors.items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            _broadcast(group, tensor)
            result[name] = tensor.cpu() if into_host else tensor
        self._store.set(f"{DONE}/{self._rank}", "1")
        return result


def _store(address: Address, timeout_s: float, *, master: bool) -> Any:
    timeout = timedelta(seconds=timeout_s)
    # Left to itself, torch listens on every interface.
    listening = _listen(address) if master else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address.host, address.port, None, master, timeout, wait_for_workers=False, master_listen_fd=listening
    )
    return dist.distributed_c10d.PrefixStore(address.token, store)


def _listen(address: Address) -> int:
    """A listening socket, the store's from now on."""
    try:
        return socket.create_server((address.host, address.port), backlog=128).detach()
    except OSError as error:
        raise TransferError(
            f"cannot listen at {address.host}:{address.port} ({error}); sync.host must be an address of the learner's "
            "own machine, and the port must be free"
        ) from error


def _group(address: Address, store: Any, rank: int, timeout_s: float) -> Any:
    """A process group outside of torch's global ones: both processes may be in others of their own."""
    size, timeout = address.num_receivers + 1, timedelta(seconds=timeout_s)
    prefixed = dist.distributed_c10d.PrefixStore("weights", store)
    if address.backend == "gloo":
        gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._timeout = timeout
        # A receiver may be on another machine, which has an address of its own.
        if rank == 0 or address.host.startswith("127."):
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address.host)]
        else:
            gloo._devices = [dist.ProcessGroupGloo.create_default_device()]
        return dist.ProcessGroupGloo(prefixed, rank, size, gloo)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(prefixed, rank, size, options)


def _broadcast(group: Any, tensor: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    # As bytes: gloo knows fewer types than torch.
    group.broadcast([tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor], options).wait()


def _device(address: Address) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if address.backend == "nccl" else torch.device("cpu")
