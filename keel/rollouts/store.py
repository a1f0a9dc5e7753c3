"""Records of a step on disk: `trajectories/000137.jsonl` (to read) and `steps/000137.safetensors` (every token stream).

A file is there whole or not at all (`keel.files`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from keel.files import write_whole
from keel.secrecy import scrubbed_values
from keel.types import Fault, Message, Routes, SamplingSettings, Segment, Support, Task, TokenSpan, Trajectory, Turn

SCHEMA_VERSION = 1


class RecordError(Fault, ValueError):
    """A record cannot be read: broken, or of another schema version."""


def write_step_record(path: Path, streams: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write a step's streams, e.g. `input_ids [T] int64`, as safetensors.

    `header` holds JSON values: sampling settings, config hash, random states, ...; the schema version is added.
    """
    metadata = {name: json.dumps(value) for name, value in header.items()}
    metadata["schema_version"] = json.dumps(SCHEMA_VERSION)
    arrays = {name: np.ascontiguousarray(stream) for name, stream in streams.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.numpy.save(arrays, metadata=metadata))


def read_step_record(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The streams and the header (`schema_version` included). Raises RecordError."""
    try:
        with safe_open(path, framework="np") as file:
            header = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise RecordError(f"{path} is not a step record: {error}") from error
    _check_version(header, path)
    return streams, header


def write_trajectories(path: Path, trajectories: Iterable[Trajectory], *, with_tokens: bool = False) -> None:
    """Write trajectories, one JSON object a line; keys and passwords that turn up in their texts are taken out.

    Token ids and routes are no texts: bytes spelled in base64 may look like a key by chance, and stay as they are.
    """
    lines = []
    for trajectory in trajectories:
        value = scrubbed_values(trajectory_to_json(trajectory))
        if with_tokens:
            value["segments"] = _segments_to_json(trajectory)
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair is no UTF-8; as an escape it is JSON.
    write_whole(path, "".join(lines).encode("utf-8", "backslashreplace"))


def read_trajectories(path: Path) -> list[Trajectory]:
    """The trajectories of a file; without segments if they were written without tokens. Raises RecordError."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(trajectory_from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:  # RecordError and JSON's own error are ValueErrors
            raise RecordError(f"{path}, line {number} is not a trajectory: {error!r}") from error
    return found


def trajectory_to_json(trajectory: Trajectory, *, with_tokens: bool = False) -> dict[str, Any]:
    """JSON values of a trajectory; `with_tokens` adds its segments (the step record has them anyway)."""
    value: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "task": {"id": trajectory.task.id, "data": dict(trajectory.task.data)},
        "group_id": trajectory.group_id,
        "attempt": trajectory.attempt,
        "status": trajectory.status,
        "reward": trajectory.reward,
        "reward_parts": dict(trajectory.reward_parts),
        "success": trajectory.success,
        "error": trajectory.error,
        "metrics": dict(trajectory.metrics),
        "num_tokens": trajectory.num_tokens,
        "num_policy_tokens": trajectory.num_policy_tokens,
        "prompt": [_message_to_json(message) for message in trajectory.prompt],
        "turns": [_turn_to_json(turn) for turn in trajectory.turns],
    }
    if with_tokens:
        value["segments"] = _segments_to_json(trajectory)
    return value


def trajectory_from_json(value: Mapping[str, Any]) -> Trajectory:
    """The trajectory that `trajectory_to_json` wrote; segments are empty if they were left out. Raises RecordError."""
    if not isinstance(value, Mapping):
        raise RecordError(f"a trajectory is a JSON object; got {value!r}")
    _check_version(value, "trajectory")
    return Trajectory(
        task=Task(value["task"]["id"], value["task"]["data"]),
        group_id=value["group_id"],
        attempt=value["attempt"],
        prompt=tuple(Message(**message) for message in value["prompt"]),
        turns=tuple(_turn_from_json(turn) for turn in value["turns"]),
        segments=tuple(Segment(tuple(map(_span_from_json, spans))) for spans in value.get("segments", ())),
        status=value["status"],
        reward=value["reward"],
        reward_parts=value["reward_parts"],
        success=value["success"],
        error=value["error"],
        metrics=value["metrics"],
    )


def _check_version(value: Mapping[str, Any], what: object) -> None:
    if value.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(f"{what}: schema version {value.get('schema_version')}; this Keel reads {SCHEMA_VERSION}")


def _message_to_json(message: Message) -> dict[str, str]:
    names = ("role", "content", "channel", "recipient", "name", "content_type")
    return {name: value for name in names if (value := getattr(message, name)) is not None}


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {
        "reply": [_message_to_json(message) for message in turn.reply],
        "reply_text": turn.reply_text,
        "finish_reason": turn.finish_reason,
        "malformed": turn.malformed,
        "observation": [_message_to_json(message) for message in turn.observation],
        "segment": turn.segment,
        "span": turn.span,
        "generate_s": turn.generate_s,
        "env_s": turn.env_s,
        "dropped": list(turn.dropped),
    }


def _turn_from_json(value: Mapping[str, Any]) -> Turn:
    messages = {name: tuple(Message(**message) for message in value[name]) for name in ("reply", "observation")}
    return Turn(**{**value, **messages, "dropped": tuple(value.get("dropped", ()))})


def _segments_to_json(trajectory: Trajectory) -> list[list[dict[str, Any]]]:
    return [[_span_to_json(span) for span in segment] for segment in trajectory.segments]


def _span_to_json(span: TokenSpan) -> dict[str, Any]:
    value: dict[str, Any] = {"origin": span.origin, "token_ids": list(span.token_ids)}
    if span.logprobs is not None and span.sampling is not None:
        sampling = {name: getattr(span.sampling, name) for name in ("temperature", "top_p", "top_k")}
        value |= {"logprobs": list(span.logprobs), "policy_version": span.policy_version, "sampling": sampling}
    routes = span.routed_experts
    if routes is not None:
        little_endian = np.frombuffer(routes.data, dtype=np.uint16).astype("<u2").tobytes()
        value["routes"] = {"shape": list(routes.shape), "base64": base64.b64encode(little_endian).decode()}
    if span.support is not None:
        little_endian = np.frombuffer(span.support.ids, dtype=np.uint32).astype("<u4").tobytes()
        value["support"] = {"counts": list(span.support.counts), "base64": base64.b64encode(little_endian).decode()}
    return value


def _span_from_json(value: Mapping[str, Any]) -> TokenSpan:
    routes = None
    if "routes" in value:
        data = np.frombuffer(base64.b64decode(value["routes"]["base64"]), dtype="<u2").astype(np.uint16).tobytes()
        routes = Routes(data, *value["routes"]["shape"])
    if value["origin"] != "policy":
        return TokenSpan(tuple(value["token_ids"]), value["origin"], routed_experts=routes)
    sampling = SamplingSettings(**value["sampling"])
    logprobs, support = tuple(value["logprobs"]), None
    if "support" in value:
        data = np.frombuffer(base64.b64decode(value["support"]["base64"]), dtype="<u4").astype(np.uint32).tobytes()
        support = Support(tuple(value["support"]["counts"]), data)
    return TokenSpan(tuple(value["token_ids"]), "policy", logprobs, value["policy_version"], sampling, routes, support)
