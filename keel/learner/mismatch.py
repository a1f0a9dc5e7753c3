"""Learner against engine: how far apart they put the same token, and whether a router's near-tie explains it."""

from __future__ import annotations

import torch

from keel.algo.kl import k3
from keel.batch import MicroBatch
from keel.learner.stats import Stats

OUTLIER_GAP = 1e-4
"""A token's log-prob gap above which float32 rounding alone is no explanation."""
NEAR_TIE = 1e-3
"""Router logits closer than this may order differently under another, equally right, order of summation."""


def add_mismatch(
    stats: Stats,
    micro_batch: MicroBatch,
    logprobs: torch.Tensor,
    routes: torch.Tensor | None,
    margins: torch.Tensor | None,
) -> None:
    """Add the sums behind `mismatch/*` for one micro-batch.

    `logprobs [T]` are the learner's before the first update on the batch, `routes [T, L, k]` and `margins [T, L]` its
    expert choices and how near a tie they were. Without recorded log-probs nothing is added.
    """
    rollout = micro_batch.rollout_logprobs
    if rollout is None:
        return
    mask = micro_batch.loss_mask & (micro_batch.policy_version >= 0)
    gap = (logprobs - rollout).abs()
    stats.add_total("mismatch/tokens", mask.sum())
    stats.add("mismatch/abs", gap, mask)
    stats.peak("mismatch/abs_max", gap, mask)
    # Tokens were drawn by the engine, so these estimate KL(engine || learner).
    stats.add("mismatch/k1", rollout - logprobs, mask)
    stats.add("mismatch/k3", k3(rollout, logprobs), mask)
    outliers = mask & ~(gap <= OUTLIER_GAP)  # a NaN is an outlier
    stats.add_total("mismatch/outliers", outliers.sum())
    if routes is None or margins is None or micro_batch.routed_experts is None:
        return
    known, different = compare_routes(micro_batch.routed_experts, routes)
    stats.add_total("mismatch/routed_tokens", known.any(-1).sum())
    stats.add_total("mismatch/route_diff", different.any(-1).sum())
    explained = explained_by_routes(different & (margins < NEAR_TIE), micro_batch)
    stats.add_total("mismatch/outliers_routed", (outliers & explained).sum())


def compare_routes(engine: torch.Tensor, learner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `[T, L, k]` choices (-1 unknown): where the engine's is known, and where the *sets* differ; both `[T, L]`.

    The order within a choice is the order of router logits, which changes no output. Raises ValueError if the shapes
    differ.
    """
    if engine.shape != learner.shape:
        raise ValueError(
            f"routes: the engine's are {tuple(engine.shape)}, the learner's {tuple(learner.shape)} (tokens, layers, "
            "experts per token); engine and learner must run the same model"
        )
    known = (engine >= 0).all(-1)
    differs = (engine.sort(-1).values != learner.to(engine.dtype).sort(-1).values).any(-1)
    return known, known & differs


def explained_by_routes(near_tie: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """[T] whether a near-tie routed differently (`near_tie [T, L]`) lies in a token's causal past, itself included."""
    counts = near_tie.any(-1).long().cumsum(0)  # [T] over sequences; what came before a sequence is subtracted
    before = torch.cat([counts.new_zeros(1), counts])[micro_batch.cu_seqlens[:-1].long()]
    return counts - before[micro_batch.row_to_sequence] > 0


def mismatch_metrics(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """The metrics of the sums that `add_mismatch` made, over all micro-batches and ranks."""
    tokens = sums.get("mismatch/tokens", 0.0)
    if not tokens:
        return {}
    metrics = {
        "mismatch/abs_mean": sums["mismatch/abs"] / tokens,
        "mismatch/abs_max": maxima["mismatch/abs_max"],
        "mismatch/k1": sums["mismatch/k1"] / tokens,
        "mismatch/k3": sums["mismatch/k3"] / tokens,
        "mismatch/outliers": sums["mismatch/outliers"],
        "mismatch/outlier_share": sums["mismatch/outliers"] / tokens,
    }
    if "mismatch/route_diff" in sums:
        metrics["mismatch/route_diff"] = sums["mismatch/route_diff"] / max(sums["mismatch/routed_tokens"], 1.0)
        metrics["mismatch/outliers_routed"] = sums["mismatch/outliers_routed"]
    return metrics
