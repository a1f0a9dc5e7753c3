"""A stage's objective: which streams it needs, and the gradient of one micro-batch's share of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from keel import plugins
from keel.algo import kl
from keel.algo.apply import correction_inputs
from keel.algo.correction.base import BoundCorrection, compose, is_token_local
from keel.algo.diagnostics import correction_summary, correction_sums
from keel.algo.load_balance import Balance, expert_counts, load_balancing_loss
from keel.algo.losses import LossInputs
from keel.algo.reduce import masked_sum, reduce_loss
from keel.batch import MicroBatch
from keel.config import AlgoConfig, Plugin
from keel.learner.mismatch import add_mismatch, add_replay, add_support, mismatch_metrics, replay_metrics
from keel.learner.replay import ReplayingPolicy
from keel.learner.stats import Stats, ratio_deviation
from keel.models.flops import FlopCount
from keel.models.policy import TokenOutputs


class Objective:
    """`algo`, with its plug-ins resolved."""

    def __init__(self, algo: AlgoConfig) -> None:
        """Raises PluginError for a plug-in that does not exist or options it does not take."""
        self.algo = algo
        self._loss: Callable[..., Any] = plugins.resolve(algo.loss.id, "keel.algo.losses")
        self._corrections = bound_corrections(algo)
        self._trust_regions = bound(algo.trust_region, "keel.algo.trust_region", "trust region")
        plugins.check_options(self._loss, algo.loss.options, f"loss {algo.loss.id!r}")
        self._kl: Callable[..., torch.Tensor] = getattr(kl, algo.kl.estimator)

    @property
    def needs_old_logprobs(self) -> bool:
        """With one update and a token-local correction, the detached log-probs are the old ones."""
        return self.algo.updates_per_batch > 1 or not all(is_token_local(each) for each, _ in self._corrections)

    @property
    def needs_reference(self) -> bool:
        return self.algo.kl.coefficient > 0

    def backward(
        self,
        policy: ReplayingPolicy,
        micro_batch: MicroBatch,
        denominator: float,
        stats: Stats,
        *,
        scale: float,
        recompute: bool,
        balance: Balance | None = None,
        idle: bool = False,
        flops: FlopCount | None = None,
    ) -> dict[str, torch.Tensor]:
        """Add the micro-batch's gradient to the parameters' and its sums to `stats`; returns `Update.streams` of it.

        The loss is over the whole update's `denominator`; the gradient is that of `scale` times it, because averaging
        over ranks divides by their number. With `recompute` an independent pass without gradient is compared. `balance`
        adds the load-balancing loss, `flops` says what the passes take. An `idle` micro-batch only keeps the ranks in
        step: nothing of it counts.
        """
        outputs = policy(
            micro_batch,
            with_routes=policy.has_routes,
            with_margins=policy.has_routes,
            with_router_logits=balance is not None,
            entropy_grad=self.algo.entropy_coefficient > 0,
        )
        detached = outputs.logprobs.detach()
        old = self._old(micro_batch, detached)
        weights = self._weights(micro_batch, old, stats)
        loss = self._reduced(micro_batch, outputs, old, weights, denominator, stats)
        if balance is not None and outputs.router_logits is not None:
            unbalanced = load_balancing_loss(outputs.router_logits, balance) * (not idle)
            stats.add_total("router/aux_loss", unbalanced)
            loss = loss + balance.coefficient * unbalanced
        (loss * scale).backward()
        mask = micro_batch.loss_mask
        stats.add_total("loss", loss)
        _add_work(stats, micro_batch, outputs, flops, idle=idle)
        if outputs.entropy is not None:
            stats.add("entropy", outputs.entropy, mask)
        stats.peak("ratio_max_dev", ratio_deviation(detached, old), mask)
        add_mismatch(stats, micro_batch, old, outputs, idle=idle)
        if outputs.routes is not None:
            add_replay(stats, micro_batch, policy.routes_of(micro_batch), idle=idle)
            stats.add_load(expert_counts(outputs.routes, policy.policy.info.num_experts) * (not idle))
        if recompute:
            with torch.no_grad():
                again = policy(micro_batch, with_entropy=False, with_support_check=True)
            stats.peak("recompute_max_dev", ratio_deviation(detached, again.logprobs), mask)
            add_support(stats, micro_batch, again.support_differs)
        streams = {"logprobs": detached}
        if outputs.entropy is not None:
            streams["entropy"] = outputs.entropy.detach()
        if weights is not None and micro_batch.importance_weights is None:
            streams["importance_weights"] = weights
        return {name: stream.cpu() for name, stream in streams.items()}

    def _old(self, micro_batch: MicroBatch, detached: torch.Tensor) -> torch.Tensor:
        if micro_batch.old_logprobs is not None:
            return micro_batch.old_logprobs
        if self.needs_old_logprobs:
            raise ValueError(
                "several updates per batch, or this correction, need old_logprobs: call score on the batch"
            )
        return detached

    def _reduced(
        self,
        micro_batch: MicroBatch,
        outputs: TokenOutputs,
        old: torch.Tensor,
        weights: torch.Tensor | None,
        denominator: float,
        stats: Stats,
    ) -> torch.Tensor:
        """The micro-batch's share of the loss, a float64 scalar; importance `weights` are on the policy's part only."""
        mask = micro_batch.loss_mask
        inputs = LossInputs(
            outputs.logprobs,
            old,
            mask,
            micro_batch.advantages,
            micro_batch.rollout_logprobs,
            micro_batch.row_to_sequence,
        )
        per_token, metrics = self._loss(inputs, **self.algo.loss.options)
        per_token = self._inside_trust_regions(per_token, inputs, stats)
        shares = micro_batch.loss_weights  # of the reduction, for every part
        both = weights if shares is None else shares if weights is None else shares * weights
        loss = reduce_loss(per_token, mask, denominator, both)
        for name, values in metrics.items():
            stats.add(f"loss/{name}", values, mask)
        if self.needs_reference:
            if micro_batch.ref_logprobs is None:
                raise ValueError("algo.kl.coefficient > 0 needs ref_logprobs: call score on the batch")
            per_token_kl = self._kl(outputs.logprobs, micro_batch.ref_logprobs)
            stats.add("kl", per_token_kl, mask)
            loss = loss + self.algo.kl.coefficient * reduce_loss(per_token_kl, mask, denominator, shares)
        if self.algo.entropy_coefficient > 0:
            assert outputs.entropy is not None
            loss = loss - self.algo.entropy_coefficient * reduce_loss(outputs.entropy, mask, denominator, shares)
        return loss

    def _inside_trust_regions(self, per_token: torch.Tensor, inputs: LossInputs, stats: Stats) -> torch.Tensor:
        """`per_token [T]` without what a trust region stops; the tokens stay in the denominator, like clipped ones."""
        if not self._trust_regions:
            return per_token
        keep = torch.ones_like(inputs.loss_mask)
        for function, options in self._trust_regions:
            keep = keep & function(inputs, **options)
        stats.add("loss/trust_region_share", (~keep).float(), inputs.loss_mask)
        return torch.where(keep, per_token, torch.zeros_like(per_token))

    def _weights(self, micro_batch: MicroBatch, old: torch.Tensor, stats: Stats) -> torch.Tensor | None:
        """Importance weights: the batch's own, or, if it was not scored, made here token by token."""
        if micro_batch.old_logprobs is not None:
            return micro_batch.importance_weights
        if not self._corrections:
            return None
        inputs = correction_inputs(micro_batch, old)
        result = compose(self._corrections, inputs)
        for name, values in result.metrics.items():
            stats.add_total(f"correction/{name}", masked_sum(values, micro_batch.loss_mask))
        for name, total in correction_sums(inputs, result.weights, micro_batch.loss_mask).items():
            stats.add_total(f"corrected/{name}", total)
        return result.weights


def _add_work(
    stats: Stats, micro_batch: MicroBatch, outputs: TokenOutputs, flops: FlopCount | None, *, idle: bool
) -> None:
    """Rows of the batch, those that were computed, and the operations that these take."""
    positions = micro_batch.positions if outputs.computed is None else micro_batch.positions[outputs.computed]
    taken = 0.0 if flops is None else flops.training(positions)
    for name, count in (("rows", micro_batch.num_tokens), ("computed_rows", len(positions)), ("flops", taken)):
        stats.add_total(name, torch.tensor(0.0 if idle else float(count), dtype=torch.float64, device=positions.device))


def bound_corrections(algo: AlgoConfig) -> tuple[BoundCorrection, ...]:
    """The functions of `algo.correction` with their options, in order. Raises PluginError as `bound` does."""
    return bound(algo.correction, "keel.algo.correction", "correction")


def bound(given: Sequence[Plugin], room: str, kind: str) -> tuple[tuple[Callable[..., Any], Mapping[str, Any]], ...]:
    """Plug-ins with their options, in order.

    Raises PluginError for one that does not exist or options it does not take.
    """
    found = []
    for plugin in given:
        function = plugins.resolve(plugin.id, room)
        plugins.check_options(function, plugin.options, f"{kind} {plugin.id!r}")
        found.append((function, plugin.options))
    return tuple(found)


def update_metrics(
    sums: dict[str, float], maxima: dict[str, float], num_tokens: float, *, recompute: bool
) -> dict[str, float]:
    """Metrics of an update from its sums and maxima over `num_tokens` loss tokens; of an empty one, zeros."""
    tokens = max(num_tokens, 1.0)
    metrics = {
        "policy/loss": sums.get("loss", 0.0),
        "policy/entropy": sums.get("entropy", 0.0) / tokens,
        "policy/clip_fraction": 0.0,
        "policy/ratio_max_dev": maxima.get("ratio_max_dev", 0.0),
        "policy/loss_tokens": num_tokens,
    }
    if sums.get("rows"):
        metrics["learner/tokens"] = sums["rows"]
        metrics["learner/tflop"] = sums["flops"] / 1e12
        metrics["learner/shared_tokens"] = sums["rows"] - sums["computed_rows"]
        metrics["learner/shared_share"] = 1.0 - sums["computed_rows"] / sums["rows"]
    if recompute:
        metrics["policy/recompute_max_dev"] = maxima.get("recompute_max_dev", 0.0)
    if "kl" in sums:
        metrics["policy/kl"] = sums["kl"] / tokens
    for name, total in sums.items():
        if name.startswith("loss/"):
            metrics[f"policy/{name.removeprefix('loss/')}"] = total / tokens
        elif name.startswith("correction/"):
            metrics[name] = total / tokens
    weighed = {name.removeprefix("corrected/"): total for name, total in sums.items() if name.startswith("corrected/")}
    if weighed:
        metrics |= correction_summary(weighed)
    if "router/aux_loss" in sums:
        metrics["router/aux_loss"] = sums["router/aux_loss"]
    return {**metrics, **mismatch_metrics(sums, maxima), **replay_metrics(sums)}
