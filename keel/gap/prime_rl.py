"""Token exports of prime-rl: `token_exports/step_<n>/rank_<r>.jsonl`, one sequence a line.

Read from prime-rl at 559b447 (src/prime_rl/trainer/rl/token_export.py, schema version 1; what writes them is
`enable_token_export = true` of the trainer's config). Every column is a list as long as the sequence, and index i
speaks of token i: the trainer shifts its log-probs right by one before it exports them (trainer/rl/train.py).
`loss_mask` marks trained tokens, `rl_weights` of 0 those whose sampling log-probs mean nothing (distilled from other
models), and a number that was not finite is null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from keel.gap.log import ENGINE, LEARNER, GapLog, GapLogError, LoggedSequence, numbers, whole_numbers

KIND = "prime-rl token export"
SCHEMA_VERSION = 1
NEEDED = ("token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs")
HOW = tuple((side, "prime-rl exports both sides with `enable_token_export = true`.") for side in (ENGINE, LEARNER))


def is_export(row: Any) -> bool:
    """Whether a JSON value is a line of a token export."""
    return isinstance(row, dict) and {"inference_logprobs", "trainer_logprobs", "token_ids"} <= row.keys()


def read(path: Path) -> GapLog:
    """The export in a file of JSON lines. Raises GapLogError for a torn line, another version, columns that differ."""
    sequences = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise GapLogError(f"{where}: no JSON ({error}); the file is torn or was not written to its end") from error
        sequences.append(_sequence(row, where))
    return GapLog(KIND, tuple(sequences), HOW)


def _sequence(row: Any, where: str) -> LoggedSequence:
    if not is_export(row):
        raise GapLogError(f"{where}: not a line of a prime-rl token export; it has {', '.join(NEEDED)}")
    if row.get("schema_version") != SCHEMA_VERSION:
        raise GapLogError(
            f"{where}: schema_version is {row.get('schema_version')!r}; this Keel reads {SCHEMA_VERSION} of prime-rl"
        )
    if "loss_mask" not in row:
        raise GapLogError(f"{where}: has no loss_mask, which says which tokens were drawn")
    token_ids = whole_numbers(row["token_ids"], name="token_ids", of=where)
    drawn = whole_numbers(row["loss_mask"], name="loss_mask", of=where).astype(bool)
    members = [_members(row, name, drawn, where) for name in ("rl_weights", "ref_kl_weights")]
    if members[0] is not None:
        drawn &= members[0] if members[1] is None else members[0] | members[1]
    return LoggedSequence(
        where,
        where,
        token_ids,
        drawn,
        numbers(row["inference_logprobs"], name="inference_logprobs", of=where),
        numbers(row["trainer_logprobs"], name="trainer_logprobs", of=where),
    )


def _members(row: dict[str, Any], name: str, drawn: np.ndarray, where: str) -> np.ndarray | None:
    """[n] bool, tokens that a component of the loss weighs; None if the row leaves the weights at their default."""
    weights = row.get(name)
    if weights is None or all(weight is None for weight in weights):
        return None
    found: np.ndarray = np.nan_to_num(numbers(weights, name=name, of=where)) != 0
    if len(found) != len(drawn):
        raise GapLogError(f"{where}: {name} has {len(found)} entries, loss_mask {len(drawn)}")
    return found
