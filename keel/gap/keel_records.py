"""Our own step records, and all of a run's, as a log of the gap."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keel.gap.log import ENGINE, LEARNER, GapLog, GapLogError, LoggedSequence
from keel.monitor.rows import RunDirectoryError
from keel.step_record import SequenceView, StepRecord, load_record

KIND = "Keel step record"
HOW = (
    (LEARNER, "A step record of Keel has the learner's `logprobs` unless the step had no loss tokens."),
    (ENGINE, "A step of demonstrations alone was drawn by nobody; take one of reinforcement."),
)


def read_run(path: Path) -> GapLog:
    """Every step record in the directory of a run. Raises GapLogError if it has none."""
    files = sorted((path / "steps").glob("*.safetensors"))
    if not files:
        raise GapLogError(f"{path}: the run has no step records (RUN/steps/*.safetensors); set record.every = 1")
    logs = [read_record_file(file) for file in files]
    return GapLog(KIND, tuple(sequence for log in logs for sequence in log.sequences), HOW, logs[0].notes)


def read_record_file(path: Path) -> GapLog:
    """The step record in a file. Raises GapLogError."""
    try:
        return read_record(load_record(path))
    except RunDirectoryError as error:
        raise GapLogError(str(error)) from error


def read_record(record: StepRecord) -> GapLog:
    """A step record that was loaded. Tokens that a correction rejected are compared too: they were drawn."""
    sequences = tuple(_sequence(record, view) for view in record.sequences)
    sampling = record.header.get("sampling") or {}
    cut = isinstance(sampling, dict) and (sampling.get("top_p", 1.0) != 1.0 or sampling.get("top_k", 0))
    note = (
        f"drawn with {sampling}: the engine's log-probs are of the truncated distribution, so a side that does not "
        "undo or replay the truncation differs by the kept mass"
    )
    return GapLog(KIND, sequences, HOW, (note,) if cut else ())


def _sequence(record: StepRecord, view: SequenceView) -> LoggedSequence:
    streams = view.streams
    where = f"{record.path}, sequence {view.index}"
    if "policy_version" not in streams:
        raise GapLogError(f"{where}: has no policy_version, which says which tokens were drawn; not written by Keel")
    learner = streams.get("old_logprobs", streams.get("logprobs"))
    routes = streams.get("routed_experts")
    if routes is not None:  # about inputs: the last token was never fed
        routes = np.concatenate([routes, np.full_like(routes[:1], -1)])
    return LoggedSequence(
        where,
        f"{record.path}:{view.trajectory}",
        view.token_ids.astype(np.int64),
        _shifted(streams["policy_version"] >= 0, False),
        None if "rollout_logprobs" not in streams else _shifted(streams["rollout_logprobs"].astype(np.float64), 0.0),
        None if learner is None else _shifted(learner.astype(np.float64), 0.0),
        None if "temperature" not in streams else _shifted(streams["temperature"].astype(np.float64), 1.0),
        routes,
    )


def _shifted(rows: np.ndarray, first: float | bool) -> np.ndarray:
    """[n] from n - 1 rows about tokens 1 to n - 1."""
    return np.concatenate([np.array([first], dtype=rows.dtype), rows])
