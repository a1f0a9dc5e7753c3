"""Tokens of an episode, one entry a token: what each one spells, and every stream that speaks of it.

    TOKENS = {"id": [..], "text": [..] or null, "bytes": [hex, ..] or null, "origin": "ccpp", "turn": [.. or null],
              "segment": [..], "version": [.. or null], "rollout_logprob": [.. or null], "old_logprob": [.. or null],
              "logprob": [..], "entropy": [.. or null], "mismatch": [.. or null], "importance_weight": [.. or null],
              "importance_weight_is": "recorded" | "computed", "advantage": [.. or null], "mask_reason": [.. or null]}

All lists are as long as the episode has tokens, over all its segments. A value stands at the token it speaks of:
streams of the record that speak of labels are shifted onto the label, so the first token of a segment, which nothing
predicts, has none. `origin` has a letter a token: c context, p drawn by the policy, d demonstrated. `logprob` and
`entropy` are the learner's, of context tokens too; what only drawn tokens have is null elsewhere. `old_logprob` is
`logprob` where there was one update per batch. `mismatch` is `old_logprob - rollout_logprob`, in nats.
`importance_weight` is what the correction made if the record has it ("recorded"), else `exp(mismatch)`, before any cap
("computed"). `mask_reason` is null for tokens that the loss is made of; else "context" (given, not drawn), "first" (of
its segment: nothing predicts it) or "correction" (which left it out).

`text` and `bytes` are null if the run's tokenizer cannot be found. Bytes are exact; text shows bytes that are no whole
character as \\xNN.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from keel.report.plain import number
from keel.runs import Run, SequenceView

Array = npt.NDArray[Any]
CONTEXT = "context"
FIRST = "first"
REJECTED = "correction"
_DIGITS = 4
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """What each token of a vocabulary spells: exact bytes, for byte-level, byte-fallback and plain vocabularies."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        description = repr(tokenizer.decoder)
        self._byte_level = "ByteLevel" in description
        self._space = "\u2581" if "Metaspace" in description or "\u2581" in description else ""
        self._cache: dict[int, tuple[str, str]] = {}

    def spell(self, token_id: int) -> tuple[str, str]:
        """Text and bytes (hex) of a token; an id that is not in the vocabulary has neither, and says so."""
        if token_id not in self._cache:
            self._cache[token_id] = self._spell(token_id)
        return self._cache[token_id]

    def _spell(self, token_id: int) -> tuple[str, str]:
        if token_id in self._added:
            text = str(self._added[token_id].content)
            return text, text.encode("utf-8", "replace").hex()
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if piece is None:
            return "[not in the vocabulary]", ""
        data = self._bytes(piece)
        return data.decode("utf-8", "backslashreplace"), data.hex()

    def _bytes(self, piece: str) -> bytes:
        if self._byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if self._space:
            piece = piece.replace(self._space, " ")
        return piece.encode("utf-8", "replace")


def find_token_text(run: Run, model_path: str = "") -> TokenText | None:
    """The run's tokenizer: of its own model, its newest checkpoint, or the local directory it started from."""
    places = [run.path / "model", *(path / "weights" for path in reversed(run.checkpoints))]
    places += [Path(model_path)] if model_path else []
    for place in places:
        file = place / "tokenizer.json"
        if file.is_file():
            try:
                return _load(str(file), file.stat().st_mtime_ns)
            except Exception as error:  # noqa: BLE001 (the library raises bare Exception for a broken file)
                problem = f"{file}: not a tokenizer: {str(error)[:200]}"
                if problem not in run.problems:
                    run.problems.append(problem)
    return None


@lru_cache(maxsize=4)
def _load(file: str, changed_ns: int) -> TokenText:  # noqa: ARG001 (part of the key)
    return TokenText(Tokenizer.from_file(file))


def token_streams(views: Sequence[SequenceView], words: TokenText | None) -> dict[str, Any]:
    """TOKENS of one trajectory from its sequences; see the module."""
    parts = [_of_sequence(view) for view in views]
    found: dict[str, Any] = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    found["origin"] = "".join(found["origin"])
    spelled = [words.spell(token) for token in found["id"]] if words is not None else None
    found["text"] = None if spelled is None else [text for text, _ in spelled]
    found["bytes"] = None if spelled is None else [data for _, data in spelled]
    recorded = all("importance_weights" in view.streams for view in views)
    found["importance_weight_is"] = "recorded" if recorded else "computed"
    return found


def _of_sequence(view: SequenceView) -> dict[str, list[Any]]:
    streams = view.streams
    version, trained = streams["policy_version"], streams["loss_mask"].astype(bool)
    drawn = version >= 0
    logprobs = streams.get("logprobs")
    old = streams.get("old_logprobs", logprobs)
    rollout = streams.get("rollout_logprobs")
    gap = old - rollout if old is not None and rollout is not None else None
    weights = streams.get("importance_weights", np.exp(gap) if gap is not None else None)
    demonstrated, everywhere = trained & ~drawn, np.ones_like(drawn)
    return {
        "id": view.token_ids.tolist(),
        "origin": ["c", *np.where(drawn, "p", np.where(demonstrated, "d", "c")).tolist()],
        "turn": [None, *(turn if turn >= 0 else None for turn in streams["turn"].tolist())],
        "segment": [view.segment] * (len(version) + 1),
        "version": [None, *(number if number >= 0 else None for number in version.tolist())],
        "rollout_logprob": _numbers(rollout, drawn),
        "old_logprob": _numbers(old, drawn),
        "logprob": _numbers(logprobs, everywhere),
        "entropy": _numbers(streams.get("entropy"), everywhere),
        "mismatch": _numbers(gap, drawn),
        "importance_weight": _numbers(weights, drawn),
        "advantage": _numbers(streams.get("advantages"), drawn | demonstrated),
        "mask_reason": [FIRST, *(_mask_reasons(drawn, trained))],
    }


def _numbers(values: Array | None, where: Array) -> list[float | int | None]:
    """[n] values about tokens 1 to n - 1 where `where [n - 1]`, None elsewhere, at the first token, or if unknown."""
    wanted = where.tolist()
    if values is None:
        return [None] * (len(wanted) + 1)
    shown = (number(value, _DIGITS) if want else None for value, want in zip(values.tolist(), wanted, strict=True))
    return [None, *shown]


def _mask_reasons(drawn: Array, trained: Array) -> list[str | None]:
    return [
        None if learned else (REJECTED if own else CONTEXT)
        for own, learned in zip(drawn.tolist(), trained.tolist(), strict=True)
    ]


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as (GPT-2's table), and the bytes they stand for.

    Printable Latin-1 stands for itself; the other bytes are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
