"""Requests and results as JSON and back, without loss: for logs, other languages and engines behind a socket.

Numbers survive exactly (Python writes floats so that they read back to the same bits; infinities and NaN are not
JSON and are refused). Routes travel as base64 of their bytes, little-endian.
"""

from __future__ import annotations

import base64
import json
import sys
from array import array
from dataclasses import asdict
from typing import Any

from keel.engines.base import DrawnSpan, GenerateRequest, GenerateResult, ScoreResult
from keel.types import Routes, SamplingSettings

Wire = GenerateRequest | GenerateResult | ScoreResult


class WireError(ValueError):
    """A text is not a request or result; says what, got and fix."""


def to_json(value: Wire) -> str:
    """`value` as one line of JSON. Raises ValueError if a float in it is not finite."""
    fields = asdict(value)
    if isinstance(value, GenerateResult | ScoreResult):
        fields["routed_experts"] = _routes_to_plain(value.routed_experts)
    return json.dumps({"kind": type(value).__name__, **fields}, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> Wire:
    """The request or result that `to_json` wrote. Raises WireError if `text` is something else."""
    try:
        fields = json.loads(text)
        kind = fields.pop("kind")
        value: Wire = _READERS[kind](fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(
            f"not a request or result: {type(error).__name__}: {error}; got {text[:120]!r}; write it with to_json"
        ) from error
    return value


def _read_request(fields: dict[str, Any]) -> GenerateRequest:
    fields["sampling"] = SamplingSettings(**fields["sampling"])
    for name in ("token_ids", "stop_token_ids"):
        fields[name] = tuple(fields[name])
    return GenerateRequest(**fields)


def _read_result(fields: dict[str, Any]) -> GenerateResult:
    fields["sampling"] = SamplingSettings(**fields["sampling"])
    fields["spans"] = tuple(
        DrawnSpan(tuple(span["token_ids"]), tuple(span["logprobs"]), span["policy_version"]) for span in fields["spans"]
    )
    fields["routed_experts"] = _routes_from_plain(fields["routed_experts"])
    return GenerateResult(**fields)


def _read_score(fields: dict[str, Any]) -> ScoreResult:
    routes = _routes_from_plain(fields["routed_experts"])
    return ScoreResult(tuple(fields["logprobs"]), routes, fields["policy_version"])


_READERS: dict[str, Any] = {
    "GenerateRequest": _read_request,
    "GenerateResult": _read_result,
    "ScoreResult": _read_score,
}


def _routes_to_plain(routes: Routes | None) -> dict[str, Any] | None:
    if routes is None:
        return None
    data = base64.b64encode(_little_endian(routes.data)).decode("ascii")
    return {"data": data, "shape": list(routes.shape)}


def _routes_from_plain(plain: dict[str, Any] | None) -> Routes | None:
    if plain is None:
        return None
    return Routes(_little_endian(base64.b64decode(plain["data"], validate=True)), *plain["shape"])


def _little_endian(data: bytes) -> bytes:
    """Native to little-endian, and back: 16-bit words swapped on a big-endian machine."""
    if sys.byteorder == "little":
        return data
    words = array("H", data)
    words.byteswap()
    return words.tobytes()
