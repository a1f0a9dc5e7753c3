"""Rollout correction: importance weights and rejections for tokens drawn by something not quite the learner's policy.

`(CorrectionInputs, *, options) -> Correction`. The engine's kernels, its precision and its staleness make
`rollout_logprobs` differ from `old_logprobs`. Throughout, with `d = old_logprobs - rollout_logprobs`,

    r = exp(d)         per token: learner over engine; above 1 where the learner finds the token more likely
    R = exp(sum of d)  per trajectory, over its loss tokens: the exact importance weight of the whole sequence
    exp(mean of d)     its geometric mean: comparable between lengths, and no importance weight of anything

Weights multiply the per-token policy loss and never enter the PPO ratio. What is rejected leaves the loss mask, and so
the denominator as well as the numerator. Corrections compose: each sees what the ones before it left over.

A correction marked `token_local` only weighs, and looks at each token alone, so that with one update per batch it is
made inside the loss from the detached log-probs; any other needs the whole batch scored first.
"""

from keel.algo.correction.rejection import reject, sequence_masked, token_masked, veto
from keel.algo.correction.weights import none, normalized, sequence_truncated, token_truncated

# Plug-ins only: these are the names that a config may give.
__all__ = [
    "none",
    "normalized",
    "reject",
    "sequence_masked",
    "sequence_truncated",
    "token_masked",
    "token_truncated",
    "veto",
]
