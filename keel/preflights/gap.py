"""The per-token gap between engine and trainer, and the noise that it is held against.

The noise is measured, not assumed: the model in plain `transformers` in the stack's own type against a higher
precision, on the very tokens that were drawn. Where a router's near-tie falls differently in float32, what comes after
it in the sequence is left out of the judged mean (and counted): it is an outlier of rounding, whatever its size. That
excuse is good for a few tokens only: where the reference has not as many outliers of its own, all of them count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from keel.models.progress import no_progress_bars
from keel.monitor.memory import machine_bytes
from keel.preflights.diagnosis_evidence import Evidence, Rows
from keel.preflights.reference import Reference
from keel.preflights.reference_changes import Change
from keel.preflights.result import GapSample
from keel.preflights.stack import Bools, Floats, ProbeData, Stack

NOISE_FACTOR = 3.0
"""A gap this many times the noise is more than rounding: two sides' rounding alone gives 1 to 2 times."""
LEAST_NOISE = {"float64": 1e-7, "float32": 3e-7, "bfloat16": 1e-3}
"""Log-probs come in float32 from both sides, so that below this nothing can be told."""
NEAR_TIE = {"float64": 1e-5, "float32": 1e-4}
"""Router logits closer than this may order differently in another, equally right, order of summation."""
FINER_EVERY = 3
"""Every so many sequences are computed in float64, which takes twice as long: rounding is alike in all."""
OUTLIER = 20.0
"""Times the noise from which on a token is an outlier."""
EXCUSED_SHARE = 0.1
"""Of all drawn tokens, those that near-ties may excuse; more if the reference itself has more outliers."""
MAX_SAMPLE = 4000


@dataclass(frozen=True)
class Noise:
    """`mean` absolute gap in nats that rounding in the stack's type makes on the drawn tokens, and its 99th percentile.

    `near_ties` `[num_drawn]`: a router's near-tie lies before the token (itself included) in its sequence.
    """

    mean: float
    p99: float
    near_ties: Bools
    against: str
    exact: Floats  # [num_drawn] log-probs of the drawn tokens by the reference, NaN where it has none
    excused_share: float = EXCUSED_SHARE

    @property
    def threshold(self) -> float:
        return NOISE_FACTOR * self.mean


@dataclass(frozen=True)
class GapFigures:
    """`judged` is the mean over tokens that no near-tie explains; `figures` are of all tokens."""

    judged: float
    num_left_out: int
    figures: Mapping[str, float]


def measure_noise(stack: Stack, data: ProbeData, reference: Reference) -> Noise:
    """Rounding of the stack's type: bfloat16 is held against float32, float32 against float64.

    Where the machine has no room for float64 weights, float32 is taken to have the least noise that can be told.
    """
    evidence = Evidence(data)
    rows = Rows(evidence)
    feeds = evidence.feeds()
    logits = reference.logits(feeds)
    rows.keep_support(logits)
    exact = rows.logprobs(logits)
    dtype = stack.source.dtype
    least = LEAST_NOISE[dtype]
    if dtype == "bfloat16":
        gap, against = np.abs(rows.logprobs(reference.logits(feeds, [Change("bfloat16")])) - exact), "float32"
    elif 8 * sum(parameter.numel() for parameter in reference.model.parameters()) < machine_bytes() / 3:
        with no_progress_bars():
            finer = Reference.load(stack.source.path, dtype=torch.float64, served_as=dtype)
        some = ProbeData(data.sequences[::FINER_EVERY])
        few = Rows(Evidence(some))
        single = reference.logits(Evidence(some).feeds())
        few.keep_support(single)
        gap = np.abs(few.logprobs(finer.logits(Evidence(some).feeds())) - few.logprobs(single))
        against = "float64"
    else:
        gap, against = np.zeros(0), "nothing: no room for float64"
    gap = gap[np.isfinite(gap)]
    near = _near_ties(data, reference, NEAR_TIE.get(dtype, 0.0))
    known = gap.size > 0
    return Noise(
        max(least, float(gap.mean()) if known else 0.0),
        max(least, float(np.quantile(gap, 0.99)) if known else 0.0),
        near,
        against,
        exact.astype(np.float32),
        max(EXCUSED_SHARE, 2 * float((gap > OUTLIER * np.median(gap)).mean()) if near.any() and known else 0.0),
    )


def judged_gap(data: ProbeData, noise: Noise) -> GapFigures:
    """The figures of the gap over all drawn tokens, and the mean that is judged."""
    difference = data.engine_logprobs().astype(np.float64) - data.trainer_logprobs().astype(np.float64)
    gap = np.abs(difference)
    gap[~np.isfinite(gap)] = np.inf
    judged, left_out = judged_mean(gap, noise)
    ratio = -difference  # log of trainer's over engine's probability; the engine drew
    figures = {
        "abs_mean": float(gap.mean()),
        "abs_p50": float(np.quantile(gap, 0.5)),
        "abs_p90": float(np.quantile(gap, 0.9)),
        "abs_p99": float(np.quantile(gap, 0.99)),
        "abs_max": float(gap.max()),
        "k1": float(difference.mean()),
        "k3": float(np.mean(np.expm1(ratio) - ratio)),
        "tokens": float(gap.size),
    }
    return GapFigures(judged, left_out, figures)


def judged_mean(gap: npt.NDArray[np.float64], noise: Noise) -> tuple[float, int]:
    """Mean of `gap [num_drawn]` without the outliers that a near-tie explains, and how many those are.

    Where near-ties are everywhere (many layers, many experts) they would excuse anything: outliers beyond
    `excused_share` of the tokens are no accident, and then none is left out.
    """
    left_out = (gap > OUTLIER * noise.mean) & noise.near_ties
    if left_out.mean() > noise.excused_share:
        return float(gap.mean()), 0
    return float(gap[~left_out].mean()), int(left_out.sum())


def gap_sample(stack: Stack, data: ProbeData) -> GapSample:
    """The drawn tokens as plots show them, at most `MAX_SAMPLE` of them, the worst kept."""
    engine, trainer = data.engine_logprobs(), data.trainer_logprobs()
    place = np.concatenate([np.flatnonzero(each.drawn) for each in data.sequences])
    number = np.concatenate([np.full(int(each.drawn.sum()), index) for index, each in enumerate(data.sequences)])
    tokens = np.concatenate([each.token_ids[each.drawn] for each in data.sequences])
    chosen = np.arange(len(engine))
    if len(chosen) > MAX_SAMPLE:
        chosen = np.sort(np.argsort(-np.abs(engine - trainer), kind="stable")[:MAX_SAMPLE])
    texts = () if stack.tokenizer is None else tuple(stack.tokenizer.decode([int(token)]) for token in tokens[chosen])
    return GapSample(
        engine=tuple(map(float, engine[chosen])),
        learner=tuple(map(float, trainer[chosen])),
        position=tuple(map(int, place[chosen])),
        sequence=tuple(map(int, number[chosen])),
        text=texts,
        num_tokens=len(engine),
    )


def _near_ties(data: ProbeData, reference: Reference, closeness: float) -> Bools:
    """`[num_drawn]` whether a near-tie of the reference's routers lies at or before the row that predicts the token."""
    if not reference.routers or not closeness:
        return np.zeros(data.num_drawn, np.bool_)
    feeds = Evidence(data).feeds()
    top_k = reference.info.top_k
    parts = []
    for each, logits in zip(data.sequences, reference.router_logits(feeds), strict=True):
        highest = torch.topk(logits.float(), min(top_k + 1, logits.shape[-1]), dim=-1).values
        margin = highest[..., top_k - 1] - highest[..., -1]  # [n, layers]
        close = (margin < closeness).any(-1).cumsum(0).numpy() > 0
        parts.append(close[np.flatnonzero(each.drawn) - 1])
    return np.concatenate(parts)
