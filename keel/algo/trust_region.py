"""Trust regions: which tokens may still move the policy, judged with the log-probs of now.

`(LossInputs, *, options) -> keep [T] bool`. Unlike a rejection (`keel.algo.correction`), which is about what engine and
learner made of a token before the update, a trust region knows the advantage and the direction of the step. A token
outside loses its gradient and stays in the denominator, as a clipped one does.
"""

from __future__ import annotations

from typing import Literal

import torch

from keel.algo.losses import LossInputs

__all__ = ["divergence", "off_policy_sequence"]


def divergence(
    inputs: LossInputs, *, kind: Literal["total_variation", "kl"] = "total_variation", threshold: float = 0.2
) -> torch.Tensor:
    """Stop a token whose probability has moved more than `threshold` from the engine's, the way its advantage points.

    With p the engine's probability of the drawn token and q the learner's now, the divergence is that of the coins that
    show it: total variation `|q - p|`, or KL `p log(p / q) + (1 - p) log((1 - p) / (1 - q))` in nats. Stopped are
    tokens of positive advantage with q > p and tokens of negative advantage with q < p; a step back is never stopped.
    DPPO (arXiv 2602.04879). A bound on probabilities treats rare and frequent tokens alike, where one on
    ratios stops rare ones early. Raises ValueError for another kind, or if nothing recorded the engine's log-probs.
    """
    if inputs.rollout_logprobs is None:
        raise ValueError("trust region 'divergence' compares with the engine's log-probs, and the batch has none")
    ours, theirs = inputs.logprobs.detach().double(), inputs.rollout_logprobs.double()
    q, p = ours.exp(), theirs.exp()
    if kind == "total_variation":
        distance = (q - p).abs()
    elif kind == "kl":
        rest_p, rest_q = (torch.log1p(-x.clamp(max=1.0 - 1e-12)) for x in (p, q))
        distance = p * (theirs - ours) + (1.0 - p) * (rest_p - rest_q)
    else:
        raise ValueError(f"divergence: got kind={kind!r}; it is 'total_variation' or 'kl'")
    advantages = inputs.required_advantages()
    outward = ((advantages > 0) & (q > p)) | ((advantages < 0) & (q < p))
    return ~(outward & (distance > threshold))


def off_policy_sequence(inputs: LossInputs, *, threshold: float = 1e-4) -> torch.Tensor:
    """Stop sequences of negative advantage on which the policy has moved: mean of `log p_engine - log p_now` above it.

    Off-policy sequence masking (DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv 2512.02556, section 3.1): learning from one's
    own recent mistakes helps, from those of a policy one no longer has it destabilizes. Raises ValueError if nothing
    recorded the engine's log-probs.
    """
    if inputs.rollout_logprobs is None:
        raise ValueError("trust region 'off_policy_sequence' compares with the engine's log-probs; the batch has none")
    moved = inputs.sequence_mean(inputs.rollout_logprobs - inputs.logprobs.detach())
    return ~((inputs.required_advantages() < 0) & (moved > threshold))
