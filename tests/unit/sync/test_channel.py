"""Who reaches the store of a broadcast. Real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from keel.sync.vllm_worker.channel import Address, Receiver, TransferError, call_off, send

WAIT_S = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def sending() -> Iterator[tuple[Address, Future[None]]]:
    """A sender that waits for its one receiver."""
    address = Address("gloo", "127.0.0.1", free_port(), 1)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(send, address, {"w": torch.tensor([1.0, 2.0])}, {}, WAIT_S)
        yield address, future
        if not future.done():
            call_off(address, "the test is over", WAIT_S)


def test_the_store_listens_on_the_given_address_alone(sending: tuple[Address, Future[None]]) -> None:
    address, future = sending
    receiver = Receiver(Address.from_text(address.as_text()), 1, WAIT_S)  # it is up
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", address.port), timeout=WAIT_S)
    assert receiver.receive()["w"].tolist() == [1.0, 2.0]
    future.result(WAIT_S)


def test_who_was_not_told_the_token_neither_reads_nor_answers(sending: tuple[Address, Future[None]]) -> None:
    address, future = sending
    receiver = Receiver(address, 1, WAIT_S)
    stranger = dist.TCPStore("127.0.0.1", address.port, None, False, timedelta(seconds=WAIT_S), wait_for_workers=False)
    assert not stranger.check(["manifest"])
    stranger.set("answer/1", "called off: by a stranger")
    call_off(replace(address, token="guessed"), "by a stranger", WAIT_S)
    assert address.token not in repr(address)
    assert receiver.receive()["w"].tolist() == [1.0, 2.0]
    future.result(WAIT_S)


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(TransferError, match=r"cannot listen at 192\.0\.2\.1:4000.*sync\.host"):
        send(Address("gloo", "192.0.2.1", 4000, 1), {"w": torch.zeros(1)}, {}, WAIT_S)
