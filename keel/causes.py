"""Why an engine and a learner may give the same token different probabilities: the names used everywhere.

Faults are planted under these names (`keel.engines.distorted`, `keel.learner.distorted`), and preflight finds them
under these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Side = Literal["engine", "learner"]


@dataclass(frozen=True, slots=True)
class Cause:
    """One kind of disagreement. `what` ends no sentence of its own; `fix` is what to do about it."""

    id: str
    title: str
    what: str
    fix: str


def _causes(*rows: tuple[str, str, str, str]) -> Mapping[str, Cause]:
    return MappingProxyType({row[0]: Cause(*row) for row in rows})


CAUSES: Mapping[str, Cause] = _causes(
    (
        "sinks_dropped",
        "attention sinks dropped",
        "one side's attention kernel leaves the learned sink logit out of the softmax",
        'use an attention that honours sinks: model.attention = "keel", or "eager" in plain transformers',
    ),
    (
        "window_off",
        "sliding window not applied",
        "one side attends to the whole past in layers that have a sliding window",
        "pass sliding_window to the kernel of those layers; check layer_types of the served config",
    ),
    (
        "window_off_by_one",
        "sliding window off by one",
        "one side's window is a token longer or shorter: `i - j < W` is a flash kernel's (W - 1, 0)",
        "count the token itself: W keys in all",
    ),
    (
        "wrong_temperature",
        "another temperature",
        "log-probs are of another temperature than the one that was asked for",
        "divide logits by the temperature that drew the token, on both sides",
    ),
    (
        "raw_logprobs",
        "raw log-probs",
        "the engine reports log-probs of the raw logits, not of the distribution it draws from",
        "vLLM: --logprobs-mode processed_logprobs",
    ),
    (
        "top_p_not_undone",
        "truncation not replayed",
        "the engine draws from a cut distribution (top-p, top-k), the learner normalizes over the whole vocabulary",
        "replay the engine's support in the learner, or sample with top_p = 1 and top_k = 0",
    ),
    (
        "stale_version",
        "old weights",
        "the engine still samples from the weights of an earlier version",
        "publish after every step, and check that it took: sync.check_every = 1",
    ),
    (
        "stale_tensor_group",
        "a tensor group that no update reaches",
        "an update of the engine's weights leaves one group of tensors as it was",
        "load that group in a way the engine's layout allows; Keel's worker extension for vLLM does",
    ),
    (
        "transposed_experts",
        "transposed experts",
        "an expert matrix arrives transposed, or with gate and up exchanged",
        "convert the checkpoint's layout once, with sizes that differ pairwise in the test",
    ),
    (
        "router_flips",
        "other experts",
        "a router's near-ties fall differently, so some tokens go to other experts",
        'replay the engine\'s routes: learner.replay_routes = "on"; or router logits in float32',
    ),
    (
        "bfloat16_noise",
        "bfloat16 rounding",
        "one side computes in bfloat16, or both do in a different order",
        "float32 head on both sides; float32 where it fits; a correction for the rest",
    ),
    (
        "wrong_rope_scaling",
        "other rotary positions",
        "one side scales rotary positions differently (theta, YaRN factor, original length)",
        "serve the same config.json on both sides; no rope override",
    ),
    (
        "wrong_template",
        "another chat template",
        "what the engine reads is rendered by another template than what the learner is shown",
        "render once, send token ids",
    ),
    (
        "retokenized_turns",
        "turns tokenized again",
        "a reply's text is tokenized again for the next turn, into other tokens than were drawn",
        "keep token ids over turns: token in, token out",
    ),
    (
        "lost_stop_token",
        "stop token lost",
        "the drawn stop token is missing from what the learner is shown",
        "keep the stop token in the reply (vLLM: include_stop_str_in_output, or return_token_ids)",
    ),
    (
        "shifted_logprobs",
        "log-probs shifted by one",
        "a log-prob stands at the token after or before its own",
        "row t predicts token t + 1; shift in one place only",
    ),
    (
        "wrong_padding",
        "padding seen or positions moved",
        "padding tokens are attended to, or positions count them",
        "pass the mask and position ids, or pack without padding",
    ),
)
