"""Several ranks behind the methods of one learner: this process gives the orders, the ranks hold the model."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import torch

from keel.batch import MicroBatch, PackedBatch
from keel.config import LearnerConfig, ModelConfig, Stage
from keel.learner.base import LearnerError, Update
from keel.learner.gradient import Objective
from keel.learner.randomness import seed_random_states
from keel.learner.rank import CLOSE, Answer, Call, RankSpec, receive, run_rank, send, stacks_file
from keel.learner.replay import lacks_support
from keel.sync.base import WeightSource
from keel.types import Verdict

SCORED_STREAMS = ("old_logprobs", "ref_logprobs", "replayed_routes")
SUPPORT_STREAMS = ("support_ids", "support_offsets")
CLOSE_TIMEOUT_S = 10.0


class LearnerGroup:
    """`learner.ranks` processes on this machine, each with its shard of the model (FSDP2 over gloo, or NCCL on CUDA).

    Micro-batches are dealt to ranks in turn. Any error ends the group: after one, ranks may wait in collectives for
    each other. The group is a context manager; `close` ends its processes.
    """

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        *,
        seed: int = 0,
        devices: Sequence[torch.device | str] | None = None,
    ) -> None:
        """Start the ranks and wait until each has its shard; `seed` seeds every process, this one too.

        `devices` holds one for each rank; None: the CPU for all.

        Raises what a rank raised while it loaded the model.
        """
        seed_random_states(seed)
        self.num_ranks = learner.ranks
        self.step = 0
        self.version = 0
        self.stage: Stage | None = None
        self._closed = False
        self._directory = tempfile.mkdtemp(prefix="keel-ranks-")
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        num_threads = max(1, torch.get_num_threads() // self.num_ranks)
        names = [str(device) for device in devices or ["cpu"] * self.num_ranks]
        for rank in range(self.num_ranks):
            spec = RankSpec(rank, self.num_ranks, self._directory, num_threads, seed, model, learner, names[rank])
            here, there = context.Pipe()
            process = context.Process(target=run_rank, args=(there, spec), name=f"keel-rank-{rank}", daemon=True)
            process.start()
            there.close()  # so that its end is seen here when the rank ends
            self._connections.append(here)
            self._processes.append(process)
        self._answers()

    @property
    def processes(self) -> list[tuple[str, int, str]]:
        """Name, process id and file of stacks of each rank."""
        return [
            (f"learner rank {rank}", process.pid or 0, stacks_file(self._directory, rank))
            for rank, process in enumerate(self._processes)
        ]

    def enter(self, stage: Stage) -> None:
        if stage == self.stage and not self._closed:
            return
        Objective(stage.algo)  # a wrong plug-in is told here, with the group still whole
        self._call("enter", stage)
        self.stage = stage

    def score(self, batch: PackedBatch) -> PackedBatch:
        answers = self._call("score", batch)
        scored = list(batch.micro_batches)
        for answer in answers:
            for index, micro_batch in enumerate(answer.micro_batches):
                scored[index] = _merged(scored[index], micro_batch)
        return batch.with_micro_batches(scored)

    def backward(self, batch: PackedBatch, update_index: int = 0) -> Update:
        updates: list[Update] = self._call("backward", batch, update_index)
        streams = {index: streams for update in updates for index, streams in update.streams.items()}
        return replace(updates[0], streams=streams)

    def apply(self, update: Update, verdict: Verdict) -> dict[str, float]:
        stats: dict[str, float] = self._call("apply", update, verdict)[0]
        return stats

    def weights_to(self, source: WeightSource) -> None:
        if source.kind == "shared":
            raise LearnerError("a learner of several ranks has no storage to share; publish its weights by file")
        self._call("weights_to", source)

    def weight_names(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self._call("weight_names")[0]
        return names

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        scored: tuple[tuple[float, ...], ...] = self._call("score_tokens", sequences)[0]
        return scored

    def change_weights(self, names: Sequence[str], change: Literal["noise", "zero"], seed: int) -> None:
        self._call("change_weights", names, change, seed)

    def restore_weights(self) -> None:
        self._call("restore_weights")

    def export(self, path: str | Path) -> None:
        self._call("export", str(Path(path).resolve()))

    def save(self, path: str | Path, extra: Mapping[str, Any]) -> None:
        self._call("save", str(Path(path).resolve()), dict(extra))

    def load(self, path: str | Path) -> dict[str, Any]:
        extra: dict[str, Any] = self._call("load", str(Path(path).resolve()))[0]
        self.stage = self._call("current_stage")[0]
        return extra

    def close(self) -> None:
        """End the ranks; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        for connection in self._connections:
            try:
                send(connection, Call(CLOSE))
            except OSError:
                continue  # that rank is gone already
        for process in self._processes:
            process.join(CLOSE_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Have every rank run `method`; their results in order of rank. On an error the group is ended."""
        if self._closed:
            raise LearnerError("this learner group is closed (a rank failed, or close was called); build a new one")
        for rank, connection in enumerate(self._connections):
            try:
                send(connection, Call(method, arguments))
            except OSError:
                self._fail(rank, None)
        answers = self._answers()
        self.step, self.version = answers[0].step, answers[0].version
        return [answer.value for answer in answers]

    def _answers(self) -> list[Answer]:
        """One answer from each rank, as they come; the first that fails or dies ends the waiting for the others."""
        answers: dict[int, Answer] = {}
        while len(answers) < self.num_ranks:
            waiting = {connection: rank for rank, connection in enumerate(self._connections) if rank not in answers}
            for connection in wait(list(waiting)):
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answer: Answer = receive(self._connections[rank])
                except (EOFError, OSError):
                    self._fail(rank, None)
                if answer.error is not None:
                    self._fail(rank, answer)
                answers[rank] = answer
        return [answers[rank] for rank in range(self.num_ranks)]

    def _fail(self, rank: int, answer: Answer | None) -> NoReturn:
        """End the group and raise: the rank's own error, or LearnerError if it died without a word."""
        for index, process in enumerate(self._processes):
            if index != rank or answer is not None:
                process.kill()
        self._processes[rank].join(CLOSE_TIMEOUT_S)
        code = self._processes[rank].exitcode
        self.close()
        if answer is None or answer.error is None:
            fix = 'a script that starts ranks needs `if __name__ == "__main__":` around its top level'
            if self.stage is not None:
                fix = "resume from the last checkpoint"
            raise LearnerError(
                f"learner rank {rank} of {self.num_ranks} ended without an answer (exit code {code}; a negative one is "
                f"the signal that killed it, -9 is often memory); {fix}"
            )
        answer.error.add_note(f"in learner rank {rank} of {self.num_ranks}:\n{answer.traceback}")
        raise answer.error


def _merged(whole: MicroBatch, part: MicroBatch) -> MicroBatch:
    """`whole` with the scored streams that `part` has, and the supports if its rank was the one to complete them."""
    names: tuple[str, ...] = SCORED_STREAMS
    if lacks_support(whole) and not lacks_support(part):
        names += SUPPORT_STREAMS
    streams: dict[str, Any] = {
        item.name: getattr(part, item.name)
        for item in fields(part)
        if item.name in names and getattr(part, item.name) is not None
    }
    return replace(whole, **streams) if streams else whole
