"""Log-probs and entropy from hidden states and a head, forward and backward: Keel's beside the whole `[T, V]` at once.

The plain computation is what trainers do without a fused head: logits, float32 log-softmax, gather, autograd. Liger's
fused GRPO loss, which is torch code and runs on a CPU, is compared where it is installed (`pip install liger-kernel`):
on-policy its gradient is that of the log-probs times the advantages, so the same one is asked of everybody.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from keel.bench.measure import (
    BenchError,
    BenchResult,
    Times,
    alternately,
    command_line,
    machine,
    peak_bytes,
)
from keel.ops.logprobs import linear_logprobs

MIB = 2**20
OURS, WIDE, PLAIN, LIGER = "keel", "keel, float32 products", "plain", "Liger"
VOCABULARY, HIDDEN, TOKENS, FEW_TOKENS = 201_088, 2880, 2048, 256  # GPT-OSS; a micro-batch; few enough for float64
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE: Mapping[str, float] = {"float32": 1e-5, "bfloat16": 3e-2}
TOLERANCE_FLOAT64 = 1e-6
SLICE = 8192
"""Rows of the head that are compared at once."""


@dataclass(frozen=True)
class Sizes:
    """Of one comparison."""

    tokens: int = TOKENS
    hidden: int = HIDDEN
    vocabulary: int = VOCABULARY
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"V {self.vocabulary:,}, hidden {self.hidden:,}, T {self.tokens:,}, {self.dtype}"


class Problem:
    """Inputs, and what runs on them: the gradient of sum(advantage * logprob), log-probs and entropy computed."""

    def __init__(self, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[sizes.dtype]
        self.sizes = sizes
        self.hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.empty(sizes.vocabulary, sizes.hidden, dtype=dtype)
        self.weight.normal_(std=sizes.hidden**-0.5, generator=generator).requires_grad_()
        self.labels = torch.randint(0, sizes.vocabulary, (sizes.tokens,), generator=generator)
        self.advantages = torch.randn(sizes.tokens, generator=generator)

    def run(self, name: str) -> torch.Tensor | None:
        """Forward and backward of `name`; the log-probs, if it gives them."""
        self.hidden.grad = self.weight.grad = None
        if name == LIGER:
            _liger_loss(self).backward()
            return None
        logprobs = _plain(self) if name == PLAIN else self._keel(wide=name == WIDE)
        (self.advantages * logprobs).sum().backward()
        return logprobs.detach()

    def gradients(self) -> list[torch.Tensor]:
        return [grad for grad in (self.hidden.grad, self.weight.grad) if grad is not None]

    def _keel(self, *, wide: bool) -> torch.Tensor:
        return linear_logprobs(self.hidden, self.weight, self.labels, float32_products=wide)[0]


def _plain(problem: Problem) -> torch.Tensor:
    log_p = torch.log_softmax(functional.linear(problem.hidden, problem.weight).float(), dim=-1)
    with torch.no_grad():
        -(log_p.exp() * log_p).sum(-1)  # the entropy, as everybody's metrics have it
    return log_p.gather(1, problem.labels[:, None])[:, 0]


def _liger_loss(problem: Problem) -> torch.Tensor:
    """A loss whose gradient is that of sum(advantage * logprob): one sequence a token, no clipping, no reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo", chunk_size=256)
    tokens = problem.sizes.tokens
    each = torch.ones(tokens, 1, dtype=torch.int64)
    value = loss(problem.hidden[:, None], problem.weight, problem.labels[:, None], each, problem.advantages)[0]
    return -tokens * value  # type: ignore[no-any-return]


def measure_logprobs(dtypes: Sequence[str], *, rounds: int, sizes: Sizes | None = None) -> BenchResult:
    """Time, peak memory and distance from float64 at GPT-OSS's vocabulary (or other `sizes`), for each of `dtypes`.

    Raises BenchError for an unknown type, and where results differ.
    """
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise BenchError(f"bench logprobs: types are {', '.join(DTYPES)}; got {unknown[0]!r}")
    facts = machine("liger-kernel")
    base = sizes or Sizes()
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    notes = [
        "Peak memory is beyond weights, inputs and the gradients of both, of forward and backward together.",
        "equal_to: largest difference of log-probs and gradients from ours, each by its own largest value.",
        "Liger's chunked GRPO loss, uncompiled, chunks of 256 tokens; its cross-entropy is a Triton kernel without a "
        "CPU version."
        if has_liger
        else "Liger is not installed here: not compared.",
    ]
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        of_type = Sizes(base.tokens, base.hidden, base.vocabulary, dtype)
        peers = [PLAIN, *([WIDE] if dtype != "float32" else []), *([LIGER] if has_liger else [])]
        rows += _rows(of_type, peers, rounds)
    if "float32" in dtypes:
        rows.append(_float64_row(Sizes(min(base.tokens, FEW_TOKENS), base.hidden, base.vocabulary)))
    return BenchResult("logprobs", command_line(), facts, rows, notes)


def _rows(sizes: Sizes, peers: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """The plain computation is timed round after round; the others, whose time no claim rests on, once."""
    Problem(Sizes(64, sizes.hidden, 4096, sizes.dtype)).run(OURS)  # what a first call keeps
    problem = Problem(sizes)
    ours = _first_run(problem, OURS)
    rows = []
    for peer in peers:
        theirs = _first_run(problem, peer)
        apart = max(map(partial(_apart, sizes, peer), ours.results, theirs.results))
        times = Times({OURS: (ours.seconds,), peer: (theirs.seconds,)})
        rows.append(_row(sizes, times, peer) | {"ours_mib": ours.mib, "peer_mib": theirs.mib, "equal_to": apart})
        del theirs  # gradients of the size of the head
    del ours
    times = alternately({name: partial(problem.run, name) for name in (OURS, PLAIN)}, rounds=rounds, warmups=0)
    rows[0] |= _row(sizes, times, PLAIN)
    return [row | {"rounds": rounds if row["peer"] == PLAIN else 1} for row in rows]


@dataclass(frozen=True)
class FirstRun:
    """What one run made and took. `mib`: the peak beyond weights, inputs and their gradients."""

    results: list[torch.Tensor | None]  # log-probs and gradients
    seconds: float
    mib: float


def _first_run(problem: Problem, name: str) -> FirstRun:
    made: list[torch.Tensor | None] = []
    problem.hidden.grad = problem.weight.grad = None
    began = 0.0

    def run() -> None:
        nonlocal began
        began = time.perf_counter()
        made.append(problem.run(name))

    taken = peak_bytes(run)
    seconds = time.perf_counter() - began
    gradients = problem.gradients()
    own = sum(grad.nbytes for grad in gradients)
    return FirstRun([*made, *gradients], seconds, round((taken - own) / MIB, 1))


def _row(sizes: Sizes, times: Times, peer: str) -> dict[str, Any]:
    ratio = times.ratio(peer, OURS)
    return {
        "case": sizes.name,
        "ours": OURS,
        "peer": peer,
        "ours_ms": round(1e3 * times.median(OURS), 1),
        "peer_ms": round(1e3 * times.median(peer), 1),
        "ratio": round(ratio.median, 3),
        "low": round(ratio.low, 3),
        "high": round(ratio.high, 3),
    }


def _apart(sizes: Sizes, peer: str, ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """The largest difference by the peer's largest value, a slice at a time; BenchError if it is too large."""
    if ours is None or theirs is None:
        return 0.0
    pairs = zip(ours.split(SLICE), theirs.split(SLICE), strict=True)
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs) / float(theirs.abs().max())
    tolerance = TOLERANCE[sizes.dtype]
    if not difference <= tolerance:
        raise BenchError(
            f"{sizes.name}: {peer} differs by {difference:.2g} of the largest value, above {tolerance:.2g}"
        )
    return difference


def _float64_row(sizes: Sizes) -> dict[str, Any]:
    """How far our float32 gradients are from those made in float64: |difference| / |theirs|, the larger of the two.

    Made from the formula, a slice of the head at a time, as autograd's own would need four times the memory.
    """
    problem = Problem(sizes)
    problem.run(OURS)
    of_hidden, of_weight = problem.gradients()
    hidden = problem.hidden.detach().double()
    weights = problem.weight.detach().split(SLICE)
    p = torch.softmax(torch.cat([hidden @ weight.double().t() for weight in weights], dim=1), dim=-1)
    grad = -problem.advantages.double()[:, None] * p
    grad[torch.arange(sizes.tokens), problem.labels] += problem.advantages
    twin = torch.zeros_like(hidden)
    difference = total = 0.0
    for part, weight, ours in zip(grad.split(SLICE, dim=1), weights, of_weight.split(SLICE), strict=True):
        twin += part @ weight.double()
        theirs = part.t() @ hidden
        difference += float((theirs - ours.double()).square().sum())
        total += float(theirs.square().sum())
    apart = max(float((of_hidden.double() - twin).norm() / twin.norm()), (difference / total) ** 0.5)
    if not apart <= TOLERANCE_FLOAT64:
        raise BenchError(f"{sizes.name}: gradients are {apart:.2g} from float64's, above {TOLERANCE_FLOAT64:.0e}")
    return {"case": sizes.name, "ours": OURS, "peer": "gradients in float64", "equal_to": apart}
