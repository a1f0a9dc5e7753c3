"""One rank of a learner group: a loop over calls that came through a pipe."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from keel.config import LearnerConfig, ModelConfig
from keel.dist.stacks import write_stacks_when_asked

CLOSE = "close"


@dataclass(frozen=True)
class RankSpec:
    """What a rank needs to start."""

    rank: int
    world_size: int
    directory: str
    num_threads: int
    seed: int
    model: ModelConfig
    learner: LearnerConfig
    device: str = "cpu"


@dataclass(frozen=True)
class Call:
    """A method of `Learner` by name, and its arguments."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a call returned, or the error it raised, and where the learner stands after it."""

    value: Any = None
    error: Exception | None = None
    traceback: str = ""
    step: int = 0
    version: int = 0


def stacks_file(directory: str, rank: int) -> str:
    """Where rank `rank` writes its stacks on SIGUSR1 (`keel.dist.stacks`)."""
    return os.path.join(directory, f"stacks-{rank}.txt")  # noqa: PTH118 (a name, not a file)


def send(connection: Connection, message: Any) -> None:
    """Send `message` by value: the default of a connection would lend tensors through shared memory."""
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """The next message; EOFError if the other end is gone."""
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - from our own parent or child


def run_rank(connection: Connection, spec: RankSpec) -> None:
    """Be a rank until told to close or until the parent is gone."""
    from keel.dist.processes import die_with_parent, join_ranks, leave_ranks

    # An interrupt is the parent's to handle; it reaches every process of the terminal, or of the job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    write_stacks_when_asked(stacks_file(spec.directory, spec.rank))
    die_with_parent()
    try:
        import torch

        from keel.learner.learner import Learner

        device = torch.device(spec.device)
        ranks = join_ranks(spec.rank, spec.world_size, spec.directory, spec.num_threads, device)
        learner = Learner(spec.model, spec.learner, seed=spec.seed, device=device, ranks=ranks)
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
        send(connection, _failure(error))
        return
    send(connection, Answer())
    while True:
        try:
            call: Call = receive(connection)
        except EOFError:
            os._exit(1)
        if call.method == CLOSE:
            break
        try:
            value = getattr(learner, call.method)(*call.arguments)
            answer = Answer(value, step=learner.step, version=learner.version)
        except Exception as error:  # noqa: BLE001 - told to the parent, which raises it
            answer = _failure(error)
        send(connection, answer)
    leave_ranks()


def _failure(error: Exception) -> Answer:
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - its own bytes
    except Exception:  # noqa: BLE001 - an error that cannot travel is told by its text
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Answer(error=error, traceback=text)
