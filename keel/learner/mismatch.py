"""Learner against engine: how far apart they put the same token, and whether a router's near-tie explains it."""

from __future__ import annotations

import torch

from keel.algo.kl import k3
from keel.batch import MicroBatch
from keel.learner.stats import Stats
from keel.models.policy import TokenOutputs

OUTLIER_GAP = 1e-4
"""A token's log-prob gap above which float32 rounding alone is no explanation."""
NEAR_TIE = 1e-3
"""Router logits closer than this may order differently under another, equally right, order of summation."""


def add_mismatch(
    stats: Stats, micro_batch: MicroBatch, logprobs: torch.Tensor, outputs: TokenOutputs, *, idle: bool = False
) -> None:
    """Add the sums behind `mismatch/*` for one micro-batch.

    `logprobs [T]` are the learner's before the first update on the batch, `outputs` of the pass that learns, expert
    choices and how near a tie they were among it. Without recorded log-probs nothing is added. Routes are compared of
    all rows, context too; of an `idle` micro-batch, which another rank has, none counts.

    `mismatch/route_diff` is about the choices that the learner's routers would make, which costs nothing to know while
    the engine's are replayed; of hidden states, then, that the replayed experts of earlier layers made, so that a
    difference counts once where it arises. `mismatch/route_disagreement` is about the experts that ran.

    `mismatch/outliers_near_tie` needs no routes of the engine's: the learner's own routers were near a tie at or before
    the token. That is weaker than `mismatch/outliers_routed`, which saw the engine choose otherwise there, so
    `mismatch/near_tie_share` says how many of all tokens lie behind one.
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
    routes, own, margins = outputs.routes, outputs.own_routes, outputs.route_margins
    if routes is None or own is None or margins is None:
        return
    behind = explained_by_routes(margins < NEAR_TIE, micro_batch)
    stats.add_total("mismatch/behind_near_tie", (mask & behind).sum())
    stats.add_total("mismatch/outliers_near_tie", (outliers & behind).sum())
    if micro_batch.routed_experts is None:
        return
    _, would_differ = compare_routes(micro_batch.routed_experts, own)
    known, different = compare_routes(micro_batch.routed_experts, routes)
    counts = not idle
    stats.add_total("mismatch/routed_tokens", known.any(-1).sum() * counts)
    stats.add_total("mismatch/route_diff", would_differ.any(-1).sum() * counts)
    stats.add_total("mismatch/route_disagreement", different.any(-1).sum() * counts)
    explained = explained_by_routes(different & (margins < NEAR_TIE), micro_batch)
    stats.add_total("mismatch/outliers_routed", (outliers & explained).sum())


def add_replay(stats: Stats, micro_batch: MicroBatch, replayed: torch.Tensor | None, *, idle: bool) -> None:
    """Add the sums behind `routes/*`: of all rows fed, how many were replayed and of how many the engine told nothing.

    `replayed [T, L, k]` is what the pass was given. Demonstrations were drawn by no engine and are not counted.
    """
    if micro_batch.rollout_logprobs is None:
        return
    counts = 0.0 if idle else 1.0
    for name, routes in (("replayed", replayed), ("told", micro_batch.routed_experts)):
        known = micro_batch.loss_mask.new_zeros(()) if routes is None else (routes >= 0).all(-1).all(-1).sum()
        stats.add_total(f"routes/{name}", known * counts)
    stats.add_total("routes/rows", torch.tensor(micro_batch.num_tokens * counts, device=micro_batch.input_ids.device))


def add_support(stats: Stats, micro_batch: MicroBatch, differs: torch.Tensor | None) -> None:
    """Add the sums behind `support/*`; `differs [T]` says where the learner would have cut otherwise.

    Without a cut nothing is added.
    """
    if differs is None or micro_batch.support_offsets is None:
        return
    sizes = micro_batch.support_offsets.diff()
    cut = micro_batch.loss_mask & (sizes > 0)
    stats.add_total("support/cut", cut.sum())
    stats.add("support/size", sizes.float(), cut)
    missing = micro_batch.support_missing
    told = cut if missing is None else cut & ~missing
    stats.add_total("support/told", told.sum())
    stats.add_total("support/differs", (differs & told).sum())


def replay_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of the sums that `add_replay` and `add_support` made, over all micro-batches and ranks."""
    metrics = {}
    if rows := sums.get("routes/rows"):
        metrics["routes/replayed_share"] = sums["routes/replayed"] / rows
        metrics["routes/missing_share"] = 1.0 - sums["routes/told"] / rows
    if cut := sums.get("support/cut"):
        metrics["support/mean_size"] = sums["support/size"] / cut
        metrics["support/missing_share"] = 1.0 - sums["support/told"] / cut
        metrics["support/own_diff"] = sums["support/differs"] / max(sums["support/told"], 1.0)
    return metrics


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
    if "mismatch/behind_near_tie" in sums:
        metrics["mismatch/near_tie_share"] = sums["mismatch/behind_near_tie"] / tokens
        metrics["mismatch/outliers_near_tie"] = sums["mismatch/outliers_near_tie"]
    if "mismatch/route_diff" in sums:
        metrics["mismatch/route_diff"] = sums["mismatch/route_diff"] / max(sums["mismatch/routed_tokens"], 1.0)
        metrics["mismatch/route_disagreement"] = sums["mismatch/route_disagreement"] / max(
            sums["mismatch/routed_tokens"], 1.0
        )
        metrics["mismatch/outliers_routed"] = sums["mismatch/outliers_routed"]
    return metrics
