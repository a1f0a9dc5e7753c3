"""The gap itself: engine against trainer, token by token, held against measured noise; routes of both sides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from keel.preflights.context import Context, SkippedError, check
from keel.preflights.gap import NOISE_FACTOR, judged_mean
from keel.preflights.result import Check
from keel.preflights.stack import ProbeData

NUM_WORST = 5


def check_gap(context: Context) -> Iterator[Check]:
    """Is the gap of the probes more than rounding?"""
    data, noise = context.probes(), context.noise()
    gap = context.gap()
    over = not gap.judged <= noise.threshold
    share = gap.judged / noise.mean
    left_out = f"; {gap.num_left_out} tokens after a router's near-tie left out" if gap.num_left_out else ""
    reason = (
        f"the mean gap of {data.num_drawn} drawn tokens is {share:.2g} x the noise of {context.stack.source.dtype} "
        f"({noise.mean:.2g} nats, measured against {noise.against}){left_out}"
    )
    yield check(
        "gap",
        "engine and trainer agree on every token",
        "fail" if over else "pass",
        reason,
        figure=gap.judged,
        threshold=noise.threshold,
        unit="nats",
        fix="see what explains the gap; correct that side, not the threshold",
        noise=noise.mean,
        noise_factor=NOISE_FACTOR,
        worst=worst_tokens(context, data),
        **gap.figures,
    )


def check_reference(context: Context) -> Iterator[Check]:
    """Which side, if any, is not the model of the directory as plain `transformers` computes it?"""
    data, noise = context.probes(), context.noise()
    gaps = {}
    for side, logprobs in (("engine", data.engine_logprobs()), ("trainer", data.trainer_logprobs())):
        gap = np.abs(logprobs.astype(np.float64) - noise.exact)[np.isfinite(noise.exact)]
        known = replace(noise, near_ties=noise.near_ties[np.isfinite(noise.exact)])
        gaps[side] = judged_mean(np.where(np.isfinite(gap), gap, np.inf), known)[0]
    wrong = [side for side, gap in gaps.items() if not gap <= noise.threshold]
    side, size = max(gaps.items(), key=lambda item: item[1])
    yield check(
        "reference",
        "both sides are the model of the directory",
        "fail" if wrong else "pass",
        f"against plain transformers in float32 the mean gap of the engine is {gaps['engine']:.2g}, of the trainer "
        f"{gaps['trainer']:.2g} nats" + (f"; at fault: {' and '.join(wrong)}" if wrong else ""),
        figure=size,
        threshold=noise.threshold,
        unit="nats",
        fix="see what explains the gap: it names the side",
        gaps=gaps,
    )


def worst_tokens(context: Context, data: ProbeData) -> list[dict[str, object]]:
    """The `NUM_WORST` tokens with the largest gaps: where, and both log-probs."""
    found = []
    for index, (each, scores) in enumerate(zip(data.sequences, data.trainer, strict=True)):
        for place in np.flatnonzero(each.drawn).tolist():
            engine, trainer = float(each.engine_logprobs[place]), float(scores.logprobs[place])
            found.append((abs(engine - trainer), index, place, engine, trainer))
    found.sort(key=lambda row: -row[0] if np.isfinite(row[0]) else -np.inf)
    tokenizer = context.stack.tokenizer
    return [
        {
            "sequence": index,
            "position": place,
            "engine": engine,
            "trainer": trainer,
            "text": "" if tokenizer is None else tokenizer.decode([int(data.sequences[index].token_ids[place])]),
        }
        for _, index, place, engine, trainer in found[:NUM_WORST]
    ]


def check_routing(context: Context) -> Iterator[Check]:
    """Do engine and trainer choose the same experts?"""
    info = context.stack.trainer.info
    title = "engine and trainer choose the same experts"
    if not info.num_moe_layers:
        raise SkippedError("the model has no experts")
    data = context.probes()
    pairs = [
        (each.routes, scores.routes, scores.margins)
        for each, scores in zip(data.sequences, data.trainer, strict=True)
        if each.routes is not None and scores.routes is not None
    ]
    if not pairs:
        side = "engine" if all(each.routes is None for each in data.sequences) else "trainer"
        raise SkippedError(f"the {side} does not return expert choices")
    known = different = far = 0
    closeness = 1e-3 if context.stack.source.dtype != "bfloat16" else 0.1
    for engine, trainer, margins in pairs:
        rows = (engine >= 0).all(-1)
        other = rows & (np.sort(engine, -1) != np.sort(trainer, -1)).any(-1)
        known += int(rows.any(-1).sum())
        different += int(other.any(-1).sum())
        if margins is not None:
            far += int(first_only(other & (margins > closeness), other))
    share = different / max(known, 1)
    yield check(
        "routing",
        title,
        "warn" if far else "pass",
        f"{different} of {known} tokens go to other experts in some layer; {far} of these choices are no near-tie "
        f"(router logits further apart than {closeness:g}), counting the first of each sequence",
        figure=share,
        threshold=None,
        unit="share of tokens",
        fix='replay the engine\'s routes (learner.replay_routes = "on"), and see what explains the gap',
        different=different,
        known=known,
        not_near=far,
    )


def first_only(far: np.ndarray, other: np.ndarray) -> int:
    """1 if the first choice that differs in a sequence is none of a near-tie: what follows it may differ because of it.

    `far` and `other` are `[n, layers]`; first is by token, then by layer.
    """
    places = np.argwhere(other)
    return int(len(places) > 0 and bool(far[tuple(places[0])]))
