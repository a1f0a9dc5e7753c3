"""The experts of one layer, forward and backward: Keel's beside each way `transformers` has, and beside bare products.

The module is `transformers`' own `GptOssExperts`, with the same weights, inputs and choices for everybody; only
`experts_implementation` changes. "Bare products" are the six matrix products that no implementation can do without (two
forward, four backward, of each expert over its own number of tokens) by whichever of this torch's two libraries is
faster, with nothing around them: no gather, no gate, no sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from keel.bench.measure import (
    BenchError,
    BenchResult,
    Times,
    alternately,
    command_line,
    machine,
    peak_bytes_apart,
    require_close,
    timed,
)
from keel.models.experts import register
from keel.ops.matmul import padded_rows, product

MIB = 2**20
OURS, PRODUCTS = "keel", "bare products"
PEERS = ("grouped_mm", "eager", "batched_mm")
FAR_SLOWER = 4.0
"""A peer that takes so many times as long as the fastest is timed once, not round after round."""
GATHERED_LIMIT = 4 * 2**30
"""Bytes of weights gathered token by token above which `batched_mm` is not run."""
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One layer's sizes; the intermediate size is the hidden size."""

    hidden: int
    tokens: int
    experts: int
    active: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"hidden {self.hidden}, {self.active} of {self.experts} experts, {self.tokens:,} tokens, {kind}"

    @property
    def gathered_bytes(self) -> int:
        """What `batched_mm` holds of one projection: a copy of its expert's weights for every token and choice."""
        return self.tokens * self.active * self.hidden * 2 * self.hidden * self.dtype.itemsize


CASES: Mapping[int, Case] = {
    128: Case(128, 11_776, 4, 2, torch.float32),
    256: Case(256, 11_776, 4, 2, torch.float32),
    2880: Case(2880, 512, 32, 4, torch.bfloat16),
}


class Layer:
    """The module with its inputs, and what runs on them."""

    def __init__(self, case: Case) -> None:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        register()
        generator = torch.Generator().manual_seed(0)
        self.case = case
        self.module: nn.Module = GptOssExperts(
            GptOssConfig(
                hidden_size=case.hidden,
                intermediate_size=case.hidden,
                num_local_experts=case.experts,
                num_experts_per_tok=case.active,
            )
        ).to(case.dtype)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(std=0.02, generator=generator)
        shares, self.chosen = torch.rand(case.tokens, case.experts, generator=generator).topk(case.active, dim=-1)
        self.hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(case.dtype).requires_grad_()
        self.weights = (shares / shares.sum(-1, keepdim=True)).to(case.dtype).requires_grad_()
        self.grad = torch.randn(case.tokens, case.hidden, generator=generator).to(case.dtype)

    def run(self, implementation: str) -> torch.Tensor:
        """Forward and backward; the output. Gradients are left on the leaves, those of a call before dropped."""
        config: Any = self.module.config
        config._experts_implementation = implementation
        for leaf in self.leaves():
            leaf.grad = None
        out: torch.Tensor = self.module(self.hidden, self.chosen, self.weights)
        out.backward(self.grad)
        return out.detach()

    def leaves(self) -> list[torch.Tensor]:
        return [self.hidden, self.weights, *self.module.parameters()]

    def products(self, multiply: Callable[[torch.Tensor, torch.Tensor, int], Any], *, filled: bool) -> None:
        """The bare products with `multiply(left, right, number of tokens)`, tokens filled up to regular numbers."""
        hidden, dtype = self.case.hidden, self.case.dtype
        counts = torch.bincount(self.chosen.reshape(-1), minlength=self.case.experts).tolist()
        module: Any = self.module
        narrow = torch.zeros(padded_rows(max(counts)), hidden, dtype=dtype)
        double = torch.zeros(padded_rows(max(counts)), 2 * hidden, dtype=dtype)
        for expert, count in enumerate(counts):
            rows = padded_rows(count) if filled else count
            x, pre = narrow[:rows], double[:rows]
            first, second = module.gate_up_proj[expert].detach(), module.down_proj[expert].detach()
            for left, right in (
                (x, first),
                (x, second),
                (x, second.t()),
                (x.t(), x),
                (pre, first.t()),
                (x.t(), pre),
            ):
                multiply(left, right, rows)


def measure_experts(sizes: Sequence[int], *, rounds: int, with_memory: bool = True) -> BenchResult:
    """Keel's experts beside each of `transformers`' and beside bare products, at each hidden size of `sizes`.

    Raises BenchError for a size there is none of, and where results differ.
    """
    if unknown := [size for size in sizes if size not in CASES]:
        raise BenchError(f"bench experts: hidden sizes are {', '.join(map(str, CASES))}; got {unknown[0]}")
    facts = machine()
    rows: list[dict[str, Any]] = []
    notes = [
        "Liger's experts are Triton kernels without a CPU version: not compared here.",
        "equal_to: the largest difference of output and gradients, each by its own largest value.",
    ]
    for size in sizes:
        rows += _case_rows(CASES[size], rounds, with_memory, notes)
    return BenchResult("experts", command_line(), facts, rows, notes)


def _case_rows(case: Case, rounds: int, with_memory: bool, notes: list[str]) -> Iterable[dict[str, Any]]:
    layer = Layer(case)
    peers = [peer for peer in PEERS if peer != "batched_mm" or case.gathered_bytes <= GATHERED_LIMIT]
    if "batched_mm" not in peers:
        gathered = case.gathered_bytes / 2**30
        notes.append(f"{case.name}: batched_mm would gather {gathered:,.0f} GiB of weights; not run.")
    apart = {peer: _require_equal(layer, peer) for peer in peers}
    once = {peer: timed(partial(layer.run, peer)) for peer in peers}
    slow = {peer for peer in peers if once[peer] > FAR_SLOWER * min(once.values())}
    contenders = {name: partial(layer.run, name) for name in (OURS, *peers) if name not in slow}
    multiplied = {
        "torch.mm": partial(layer.products, lambda left, right, _: torch.mm(left, right), filled=False),
        "keel.ops.matmul": partial(layer.products, lambda left, right, n: product(left, right, rows=n), filled=True),
    }
    times = alternately({**contenders, **multiplied}, rounds=rounds)
    faster = min(multiplied, key=times.median)
    memory = {name: _peak_mib(case, name) for name in contenders} if with_memory else {}
    rows = [_row(case, times, peer, peer, rounds) | {"equal_to": apart[peer]} for peer in contenders if peer != OURS]
    rows += [_single_row(case, times, peer, once[peer]) | {"equal_to": apart[peer]} for peer in slow]
    rows.append(_row(case, times, faster, f"{PRODUCTS} ({faster})", rounds))
    for row in rows:
        row["ours_mib"], row["peer_mib"] = memory.get(OURS), memory.get(row["peer"])
    return rows


def _row(case: Case, times: Times, contender: str, peer: str, rounds: int) -> dict[str, Any]:
    ratio = times.ratio(contender, OURS)
    return {
        "case": case.name,
        "ours": OURS,
        "peer": peer,
        "ours_ms": round(1e3 * times.median(OURS), 2),
        "peer_ms": round(1e3 * times.median(contender), 2),
        "ratio": round(ratio.median, 3),
        "low": round(ratio.low, 3),
        "high": round(ratio.high, 3),
        "rounds": rounds,
    }


def _single_row(case: Case, times: Times, peer: str, seconds: float) -> dict[str, Any]:
    ratio = round(seconds / times.median(OURS), 3)
    row = {"case": case.name, "ours": OURS, "peer": peer, "ours_ms": round(1e3 * times.median(OURS), 2)}
    return row | {"peer_ms": round(1e3 * seconds, 2), "ratio": ratio, "low": ratio, "high": ratio, "rounds": 1}


def _require_equal(layer: Layer, peer: str) -> float:
    """How far a peer's output and gradients are from ours; each is called once, which also warms it up."""
    ours = [layer.run(OURS), *(leaf.grad for leaf in layer.leaves() if leaf.grad is not None)]
    theirs = [layer.run(peer), *(leaf.grad for leaf in layer.leaves() if leaf.grad is not None)]
    tolerance = TOLERANCE[layer.case.dtype]
    pairs = zip(ours, theirs, strict=True)
    return max(require_close(f"{layer.case.name}, {peer}", a, b, tolerance=tolerance) for a, b in pairs)


def _peak_mib(case: Case, implementation: str) -> float:
    taken = peak_bytes_apart("keel.bench.experts:memory_case", hidden=case.hidden, implementation=implementation)
    return round(taken / MIB, 1)


def memory_case(hidden: int, implementation: str) -> Callable[[], Any]:
    """For `peak_bytes_apart`: a second forward and backward, gradients of the parameters included."""
    layer = Layer(CASES[hidden])
    layer.run(implementation)
    for leaf in layer.leaves():
        leaf.grad = None
    return lambda: layer.run(implementation)
