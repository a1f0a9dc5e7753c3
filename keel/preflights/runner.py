"""The checks in their order; what fails, fails alone, and what was gained before it is kept."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import keel
from keel.engines.base import EngineError
from keel.preflights.checks import attention, engine, gap, text, trainer, weights
from keel.preflights.context import Context, SkippedError, check
from keel.preflights.diagnosis import diagnose
from keel.preflights.diagnosis_evidence import StackFacts
from keel.preflights.gap import gap_sample
from keel.preflights.probes import ProbePlan
from keel.preflights.result import Attribution, Check, PreflightResult
from keel.preflights.stack import ProbeData, Stack
from keel.secrecy import scrubbed

Ask = Callable[[Context], Iterable[Check]]
Tell = Callable[[str], None]
ATTRIBUTION_SHARE = 0.8
"""What naming the cause may take, in processor time, of the time budget; what the checks took is not taken off, so that
the cause that is named does not depend on how busy the machine is."""
WITHOUT_EFFECT = {"attention.sinks": "sinks_dropped"}
"""Tensor groups that do nothing under a cause: that no push of them shows is that cause's doing, and no other."""
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "vllm")


@dataclass(frozen=True)
class Question:
    """One function that makes checks; `id` and `title` name it where it makes none, `engine` says that it asks it."""

    id: str
    title: str
    ask: Ask
    engine: bool = False


QUESTIONS: tuple[Question, ...] = (
    Question("round_trip", "what is rendered is read back the same", text.check_round_trip),
    Question("prefix", "later turns only add tokens", text.check_prefix),
    Question("stop_tokens", "stop tokens are known to all", text.check_stop_tokens),
    Question("memory", "the plan fits the memory that is there", trainer.check_memory),
    Question("sinks", "attention sinks are used and learned by the trainer", attention.check_sinks),
    Question("windows", "every layer of the trainer sees its window, and no more", attention.check_windows),
    Question("attention", "attention equals its dense twin", attention.check_attention),
    Question("attention_backends", "every attention kernel that could be used agrees", attention.check_backends),
    Question("experts", "experts equal a plain loop over experts", trainer.check_experts),
    Question("engine", "the engine answers", engine.check_health, engine=True),
    Question("identity", "both sides have the same tokenizer, template and configuration", engine.check_identity, True),
    Question("gap", "engine and trainer agree on every token", gap.check_gap, engine=True),
    Question("reference", "both sides are the model of the directory", gap.check_reference, engine=True),
    Question("routing", "engine and trainer choose the same experts", gap.check_routing, engine=True),
    Question("stopping", "a reply ends with its stop token", engine.check_stopping, engine=True),
    Question("sessions", "keys and values kept over turns are right", engine.check_sessions, engine=True),
    Question("determinism", "the same seed gives the same reply", engine.check_determinism, engine=True),
    Question("neighbours", "a sequence does not depend on what lies beside it", trainer.check_neighbours, engine=True),
    Question("recompute", "the same micro-batches give the same bits", trainer.check_recompute, engine=True),
    Question("weights", "every tensor group that is pushed arrives", weights.check_weights, engine=True),
)


def run_checks(
    stack: Stack,
    *,
    seed: int = 0,
    budget_s: float = 150.0,
    share: float = 1.0,
    max_sequence_tokens: int = 0,
    tell: Tell = lambda _: None,
    facts: Mapping[str, Any] | None = None,
) -> PreflightResult:
    """Everything that can be told of `stack`, in about `budget_s` seconds (of processor time, where that can be had).

    `share` scales the number of probes, `max_sequence_tokens` bounds them (0: 512, or what the engine takes). `facts`
    are further fields of `StackFacts`. Never raises for what the stack does: a check fails, with what was gained kept.
    """
    able = stack.engine.capabilities()
    # An engine may draw one token after what it scores, so that a sequence is one shorter than it could be.
    limit = min(able.max_sequence_tokens or 512, max_sequence_tokens or 512) - 1
    context = Context(stack, ProbePlan(seed=seed, max_sequence_tokens=limit).scaled(share), budget_s)
    checks: list[Check] = []
    for question in QUESTIONS:
        tell(question.title)
        checks += _asked(question, context)
    tell("what explains the gap")
    attribution, closing = _explained(context, facts or {})
    data = context.known_probes
    measured = any(each.id == "gap" and each.figure is not None for each in checks)
    return PreflightResult(
        stack={
            **stack.description,
            **_measured_on(data),
            "seconds": {name: round(s, 2) for name, s in context.seconds.items()},
        },
        checks=(*checks, *closing),
        attribution=(*attribution, *told_by_checks(checks, attribution)),
        gap=dict(context.gap().figures) if measured else {},
        noise=context.noise().mean if measured else None,
        sample=gap_sample(stack, data) if data is not None and data.trainer else None,
        duration_s=time.perf_counter() - context.began,
        versions=versions(),
    )


def _measured_on(data: ProbeData | None) -> dict[str, Any]:
    """What was used."""
    if data is None:
        return {}
    told = {"sequences": len(data.sequences), "tokens": data.num_tokens, "drawn_tokens": data.num_drawn}
    return {**told, "notes": list(data.notes)} if data.notes else told


def _asked(question: Question, context: Context) -> Iterator[Check]:
    """The checks of a question; an engine that fails is asked no more."""
    if question.engine and context.engine_failure:
        yield check(question.id, question.title, "skip", f"the engine failed before: {context.engine_failure}")
        return
    made: list[Check] = []
    began = time.perf_counter()
    try:
        for each in question.ask(context):
            made.append(each)
            yield each
    except SkippedError as why:
        yield check(question.id, question.title, "skip", str(why))
    except EngineError as error:
        yield _failed(question, f"the engine failed: {error}", "see the engine's log; start it anew, then check again")
        context.engine_failure = "" if _is_alive(context) else scrubbed(str(error))
    except Exception as error:  # noqa: BLE001 (the border: a stack may fail in any way, and what was gained is kept)
        reason = f"{type(error).__name__}: {error}"
        yield _failed(question, reason, "this stack cannot be run in this way; the reason names what gave way")
    finally:
        context.seconds[question.id] = time.perf_counter() - began


def _failed(question: Question, reason: str, fix: str) -> Check:
    return check(question.id, question.title, "fail", scrubbed(reason), fix=fix)


def _is_alive(context: Context) -> bool:
    try:
        return context.stack.engine.health().ok
    except EngineError:
        return False


def _explained(context: Context, facts: Mapping[str, Any]) -> tuple[tuple[Attribution, ...], list[Check]]:
    """What explains the gap of the probes, if there are any."""
    data = context.known_probes
    if data is None or not data.trainer:
        return (), []
    stack = context.stack
    known = StackFacts(
        dtype=stack.source.dtype,
        stop_token_ids=stack.chat.stop_token_ids if stack.chat is not None else (),
        tokenizer=stack.tokenizer,
        **facts,
    )
    question = Question("attribution", "what explains the gap", lambda _: ())
    try:
        found = diagnose(context.reference(), data, known, budget_s=ATTRIBUTION_SHARE * context.budget_s)
    except SkippedError as why:
        return (), [check(question.id, question.title, "skip", str(why))]
    except Exception as error:  # noqa: BLE001 (the border, as above)
        return (), [_failed(question, f"{type(error).__name__}: {error}", "the checks above stand without it")]
    return tuple(found), []


def told_by_checks(checks: Iterable[Check], known: Iterable[Attribution]) -> Iterator[Attribution]:
    """Causes that a check names by itself, where the gap of the probes does not show them: old weights, say."""
    known = tuple(known)
    named = {(each.cause, each.group) for each in known}
    causes = {each.cause for each in known if each.side == "engine"}
    for each in checks:
        cause = str(each.details.get("cause", ""))
        if not cause:
            continue
        groups = each.details.get("stale", []) if cause == "stale_tensor_group" else [""]
        for group in groups:
            if (cause, group) not in named and WITHOUT_EFFECT.get(group) not in causes:
                gaps: Mapping[str, float] = each.details.get("gaps", {})
                gap = gaps.get(group) or max(gaps.values(), default=each.figure or 0.0)
                yield Attribution(cause, "engine", 1.0, gap, 0.0, group=group, text=each.reason)


def versions() -> dict[str, str]:
    """Versions of what computes, by distribution; what is not installed is left out."""
    found = {"keel": keel.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
