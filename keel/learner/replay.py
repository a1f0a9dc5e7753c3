"""The policy as the learner runs it: with the experts that the engine chose, wherever they are known.

Two passes over the same tokens may choose other experts where router logits nearly tie, and then compute something
else. So the learner's passes take the engine's choices, weighted by their own routers (with gradient): the score pass,
the training pass, its recomputation under gradient checkpointing, the recompute check, and the reference, which thus is
the very policy while weights are equal. Where choices are missing a token's are the pass's own. Of several updates on
one batch, the first pass over it chooses what is missing, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch

from keel.algo.load_balance import expert_counts
from keel.batch import MicroBatch
from keel.learner.base import LearnerError
from keel.models.policy import PolicyModel, TokenOutputs
from keel.models.router import replay_routes
from keel.models.shared_rows import Share


class ReplayingPolicy:
    """Called like `policy`. `mode` is `learner.replay_routes`.

    "auto" replays wherever there are routes: a route is data about how a token was drawn, like its temperature, and a
    pass that ignores it computes the log-prob of another policy. "on" also refuses drawn tokens that have none.
    """

    def __init__(self, policy: PolicyModel, mode: Literal["auto", "on", "off"], share_prefixes: Share = "off") -> None:
        """`share_prefixes` is `learner.share_prefixes`: every pass over a micro-batch shares the same rows.

        Raises LearnerError for "on" with a model whose choices cannot be replayed, or whose rows cannot be shared.
        """
        self.policy = policy
        self.mode = mode
        self.share_prefixes: Share = share_prefixes
        if share_prefixes == "on" and (problem := policy.sharing_problem()):
            raise LearnerError(f'learner.share_prefixes = "on", but {problem}; or set it to "auto"')
        self.has_routes = 0 < policy.info.num_moe_layers == len(policy.routers)
        if mode == "on" and not self.has_routes:
            has = f"{policy.info.num_moe_layers} layers of experts, {len(policy.routers)} with a router that Keel knows"
            raise LearnerError(
                f'learner.replay_routes = "on", but {policy.info.model_type} has {has}; set it to "auto" or "off"'
            )

    @property
    def replays(self) -> bool:
        """Whether choices are replayed where they are known."""
        return self.has_routes and self.mode != "off"

    def __call__(self, micro_batch: MicroBatch, **options: Any) -> TokenOutputs:
        routes = self.routes_of(micro_batch)
        with nullcontext() if routes is None else replay_routes(routes):
            outputs: TokenOutputs = self.policy(micro_batch, share_prefixes=self.share_prefixes, **options)
        return outputs

    def routes_of(self, micro_batch: MicroBatch) -> torch.Tensor | None:
        """What is replayed, `[T, L, k]` with -1 where the pass chooses; None if nothing is.

        Raises ValueError for routes of another model's shape.
        """
        if not self.replays:
            return None
        routes = micro_batch.routed_experts if micro_batch.replayed_routes is None else micro_batch.replayed_routes
        if routes is None:
            return None
        info = self.policy.info
        expected = (micro_batch.num_tokens, info.num_moe_layers, info.top_k)
        if tuple(routes.shape) != expected or (routes.numel() and int(routes.max()) >= info.num_experts):
            raise ValueError(
                f"routes: the engine's are {tuple(routes.shape)} with experts up to {int(routes.max())}, the learner's "
                f"{expected} (tokens, layers, experts per token) of {info.num_experts} experts; engine and learner "
                "must run the same model"
            )
        return routes

    def require(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Raises LearnerError if choices must be replayed and drawn tokens have none at all."""
        if self.mode == "on" and any(
            each.rollout_logprobs is not None and each.routed_experts is None and each.replayed_routes is None
            for each in micro_batches
        ):
            raise LearnerError(
                'learner.replay_routes = "on", but the engine returned no expert choices and no score pass was made; '
                'set engine.return_routes = true, use an engine that returns them, or set replay_routes = "auto"'
            )


def old_streams(policy: ReplayingPolicy, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
    """`old_logprobs [T]`, and the experts they are of, for all passes to come."""
    outputs = policy(micro_batch, with_entropy=False, with_routes=policy.replays)
    streams = {"old_logprobs": outputs.logprobs}
    return streams if outputs.routes is None else {**streams, "replayed_routes": outputs.routes}


def reference_streams(policy: ReplayingPolicy, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
    """`ref_logprobs [T]`, over the same experts and the same supports."""
    return {"ref_logprobs": policy(micro_batch, with_entropy=False).logprobs}


def own_support_streams(policy: ReplayingPolicy, micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The supports, with the policy's own cut where the engine told none; the drawn token is always inside."""
    support = policy(micro_batch, with_entropy=False, with_own_support=True).own_support
    assert support is not None
    return {"support_ids": support.ids, "support_offsets": support.offsets}


def chosen_counts(policy: ReplayingPolicy, micro_batch: MicroBatch) -> torch.Tensor:
    """How many tokens choose each expert in a pass without gradient, `[L, E]`."""
    with torch.no_grad():
        routes = policy(micro_batch, with_entropy=False, with_routes=True).routes
    assert routes is not None
    return expert_counts(routes, policy.policy.info.num_experts)


def sum_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Their sum, of one or more."""
    return torch.stack(list(tensors)).sum(0)


def lacks_support(micro_batch: MicroBatch) -> bool:
    """Was a token drawn from a cut distribution, and nobody says to what it was cut?"""
    missing, offsets = micro_batch.support_missing, micro_batch.support_offsets
    return missing is not None and offsets is not None and bool((missing & (offsets.diff() == 0)).any())


def refuse_without_support(micro_batches: Iterable[MicroBatch]) -> None:
    """Raises LearnerError if a micro-batch has tokens whose log-prob cannot be told."""
    if any(map(lacks_support, micro_batches)):
        raise LearnerError(
            "tokens were drawn with top_p or top_k and the engine did not say what was left to choose from, so their "
            "log-probs would be those of another distribution; use an engine that returns it, set rollout.top_p = 1.0 "
            'and rollout.top_k = 0, or learner.missing_support = "own_cut" (the cut is made again by the learner)'
        )
