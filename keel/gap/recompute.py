"""The learner's side of a log, recomputed: one pass of a model over the logged tokens, without gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from keel.batch import MicroBatch
from keel.gap.log import GapLog, GapLogError, LoggedSequence
from keel.models.policy import PolicyModel

__all__ = ["load_model", "with_learner"]


def load_model(path: str | Path, *, dtype: str = "float32") -> PolicyModel:
    """The model of a Hugging Face directory or hub id, to recompute with. Raises GapLogError if it is none."""
    if dtype not in ("float32", "bfloat16"):
        raise GapLogError(f"--dtype is float32 or bfloat16; got {dtype!r}")
    try:
        return PolicyModel.load(path, dtype=dtype)
    except (OSError, ValueError, NotImplementedError) as error:
        raise GapLogError(f"--model {path}: cannot be loaded: {error}") from error


def with_learner(log: GapLog, policy: PolicyModel, *, temperature: float = 1.0) -> GapLog:
    """The log with the learner's log-probs where it lacks them, and the learner's routes where the engine's are logged.

    Log-probs are those of softmax(logits / temperature), with the log's own temperatures where it has them and
    `temperature` elsewhere. Raises GapLogError for a sequence without token ids, or with ids beyond the vocabulary.
    """
    if not temperature > 0:
        raise GapLogError(f"--temperature is {temperature}; logits are divided by it, so it is above 0")
    return replace(log, sequences=tuple(_completed(each, policy, temperature) for each in log.sequences))


def _completed(sequence: LoggedSequence, policy: PolicyModel, temperature: float) -> LoggedSequence:
    if sequence.learner_logprobs is not None or not sequence.drawn.any():
        return sequence
    ids = sequence.token_ids
    if (ids < 0).any():
        raise GapLogError(f"{sequence.where}: has no token ids, and without them nothing can be recomputed")
    if int(ids.max()) >= policy.info.vocab_size:
        raise GapLogError(
            f"{sequence.where}: token id {int(ids.max())} is beyond the model's vocabulary of "
            f"{policy.info.vocab_size}; --model is not the model that drew these tokens"
        )
    if sequence.drawn[0]:
        raise GapLogError(f"{sequence.where}: its first token is said to be drawn, but nothing predicts it")
    rows = torch.from_numpy(ids.astype(np.int64))
    given = np.full(len(ids), temperature) if sequence.temperature is None else sequence.temperature
    micro_batch = _micro_batch(
        rows, torch.from_numpy(sequence.drawn.copy()), torch.from_numpy(given.astype(np.float32))
    )
    with_routes = sequence.routes is not None
    with torch.no_grad():
        outputs = policy(micro_batch, with_entropy=False, with_routes=with_routes)
    logprobs = np.concatenate([[0.0], outputs.logprobs.double().cpu().numpy()])
    routes = outputs.routes
    return replace(
        sequence,
        learner_logprobs=logprobs,
        learner_routes=None if routes is None else _about_inputs(routes.cpu().numpy()),
    )


def _micro_batch(tokens: torch.Tensor, drawn: torch.Tensor, temperature: torch.Tensor) -> MicroBatch:
    """One sequence of n tokens as n - 1 rows."""
    num_rows = len(tokens) - 1
    return MicroBatch(
        input_ids=tokens[:-1],
        positions=torch.arange(num_rows),
        labels=tokens[1:],
        loss_mask=drawn[1:],
        cu_seqlens=torch.tensor([0, num_rows], dtype=torch.int32),
        sequence_to_trajectory=torch.zeros(1, dtype=torch.int64),
        policy_version=torch.where(drawn[1:], 0, -1).to(torch.int32),
        temperature=torch.where(drawn[1:], temperature[1:], 1.0),
        turn=torch.zeros(num_rows, dtype=torch.int32),
        max_seqlen=num_rows,
    )


def _about_inputs(routes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """[n, layers, k] from n - 1 rows about tokens 0 to n - 2."""
    return np.concatenate([routes, np.full_like(routes[:1], -1)])
