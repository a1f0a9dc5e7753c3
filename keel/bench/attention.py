"""Attention with sinks, forward and backward: beside transformers' eager, beside the stock kernel without sinks, by
window, and how much memory it takes as sequences grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from keel.bench.measure import (
    BenchError,
    BenchResult,
    Times,
    alternately,
    command_line,
    machine,
    peak_bytes_apart,
    require_close,
)
from keel.ops.attention import choose_backend, layout_attention, packed_layout, usable_backends

HEAD_SIZE = 64
WINDOW = 128
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}
"""Of the largest value: some units of rounding of sums over thousands of keys."""
NOTES = (
    "forward + backward of one layer's attention, packed rows, heads of 64; sinks from -4 to 4",
    "eager: transformers' eager_attention_forward of GPT-OSS, its mask made before",
    "stock: the same kernel without sinks (scaled_dot_product_attention on a CPU, the backend without sinks on a card)",
    "products_ms: what the seven products of the causal half alone would take, at the rate of a 2,048 x 2,048 product",
    "mib: resident (on a card: allocated) memory at its peak above what was there before, in a fresh process on a CPU",
)

Results = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Work:
    """One packed row: `lengths` of its sequences, heads, window and type."""

    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    window: int | None
    dtype: torch.dtype
    device: torch.device = CPU

    @property
    def case(self) -> str:
        """The row's name in the table."""
        dtype = str(self.dtype).removeprefix("torch.")
        packed = "" if len(self.lengths) == 1 else f" in {len(self.lengths)}"
        seen = "full" if self.window is None else f"window {self.window}"
        return f"T {sum(self.lengths):,}{packed}, {self.num_heads}/{self.num_kv_heads} heads, {dtype}, {seen}"

    def inputs(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(q, k, v, sinks), wanting gradients, and the gradient of the output."""
        draw = torch.Generator().manual_seed(0)
        total = sum(self.lengths)
        sizes = [(total, heads, HEAD_SIZE) for heads in (self.num_heads, *[self.num_kv_heads] * 2, self.num_heads)]
        *leaves, grad = (torch.randn(size, generator=draw).to(self.device, self.dtype) for size in sizes)
        leaves.append(torch.linspace(-4, 4, self.num_heads).to(self.device, self.dtype))
        return [leaf.requires_grad_() for leaf in leaves], grad

    def ours(self, backend: str = "auto", *, sinks: bool = True) -> Callable[[], Results]:
        """Keel's attention by `backend`."""
        (q, k, v, sink), grad = self.inputs()
        layout = packed_layout(torch.tensor([0, *self.lengths]).cumsum(0), self.window)
        leaves = (q, k, v, sink) if sinks else (q, k, v)

        def run() -> Results:
            used = sink if sinks else None
            out = layout_attention(q, k, v, used, layout=layout, scale=HEAD_SIZE**-0.5, backend=backend)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

        return run

    def stock(self) -> Callable[[], Results]:
        """The same kernel without sinks."""
        if self.device.type != "cpu":
            return self.ours(sinks=False)
        (q, k, v, _), grad = self.inputs()
        grouped = self.num_heads != self.num_kv_heads

        def run() -> Results:
            query, key, value = (each.transpose(0, 1)[None] for each in (q, k, v))
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            out = out[0].transpose(0, 1)
            return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

        return run

    def eager(self) -> Callable[[], Results]:
        """transformers' own, over one sequence."""
        (q, k, v, sink), grad = self.inputs()
        total = sum(self.lengths)
        position = torch.arange(total, device=self.device)
        distance = position[:, None] - position
        hidden = (distance < 0) | (distance >= (self.window or total))
        mask = torch.zeros(1, 1, total, total, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        group = self.num_heads // self.num_kv_heads
        module = SimpleNamespace(num_key_value_groups=group, sinks=sink, training=True)

        def run() -> Results:
            rows = (each.transpose(0, 1)[None] for each in (q, k, v))
            out = eager_attention_forward(module, *rows, mask, scaling=HEAD_SIZE**-0.5)[0][0]
            return [out.detach(), *torch.autograd.grad(out, (q, k, v, sink), grad)]

        return run

    def products_ms(self) -> float:
        """Two products forward and five backward over the causal half, at the rate of a large square product."""
        size = 2048
        square = torch.randn(size, size, device=self.device).to(self.dtype)
        seconds = alternately({"products": lambda: square @ square}, rounds=5, finish=_finish(self.device))
        flops = 7 * 2 * HEAD_SIZE * self.num_heads * sum(length**2 / 2 for length in self.lengths)
        return 1e3 * seconds.median("products") * flops / (2 * size**3)


def measure_attention(*, rounds: int, parts: Sequence[str]) -> BenchResult:
    """The `parts` ("speed", "window", "memory") on a CUDA card if there is one, else on the CPU.

    Raises BenchError for another part, and if results differ.
    """
    rows: dict[str, Callable[[torch.device, int], Iterator[dict[str, Any]]]]
    rows = {"speed": _speed, "window": _windows, "memory": _memory}
    if unknown := [part for part in parts if part not in rows]:
        raise BenchError(f"bench attention: parts are {', '.join(rows)}; got {unknown[0]!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine("transformers", "flash-attn", "flash-attn-3")
    found = [row for part in parts for row in rows[part](device, rounds)]
    return BenchResult("attention", command_line(), facts, found, NOTES)


def _speed(device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Beside eager and beside the stock kernel without sinks."""
    for work in _speed_work(device):
        contenders = {"keel": work.ours(), "stock": work.stock()}
        is_small = sum(work.lengths) <= 8192 and len(work.lengths) == 1
        if is_small:
            contenders["eager"] = work.eager()
        if device.type != "cpu":
            others = usable_backends(device, work.dtype, HEAD_SIZE)[1:]
            contenders |= {backend.name: work.ours(backend.name) for backend in others}
        equal_to = _equal(work, contenders)
        times = alternately(contenders, rounds=rounds, finish=_finish(device))
        products_ms = round(work.products_ms(), 1)
        for peer in contenders:
            if peer != "keel":
                yield _row(work, times, "keel", peer, equal_to) | {"products_ms": products_ms}


def _speed_work(device: torch.device) -> Iterator[Work]:
    if device.type == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            for num_kv_heads in (8, 1):
                yield Work((4096,), 8, num_kv_heads, None, dtype)
        return
    for lengths in ((8192,), (5000, 3000, 192), (32768,), (20000, 8000, 4000, 768)):
        for window in (None, WINDOW):
            yield Work(lengths, 64, 8, window, torch.bfloat16, device)


def _windows(device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """A window beside full attention, at 16,384 tokens; checked against eager at 1,024."""
    for dtype in (torch.float32, torch.bfloat16):
        if device.type != "cpu" and dtype == torch.float32:
            continue
        small = Work((1024,), 8, 8, WINDOW, dtype, device)
        equal_to = _equal(small, {"keel": small.ours(), "eager": small.eager()})
        work, full = (Work((16384,), 8, 8, window, dtype, device) for window in (WINDOW, None))
        contenders = {"window": work.ours(), "full": full.ours()}
        times = alternately(contenders, rounds=max(1, rounds // 2), finish=_finish(device))
        yield _row(work, times, "window", "full", equal_to)


def _memory(device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """The peak of one forward and backward, from 1,024 to 32,768 tokens; eager's as far as it goes."""
    for window in (None, WINDOW):
        for total in (1024, 2048, 4096, 8192, 16384, 32768):
            yield _memory_row("keel", total, window, device)
    for total in (1024, 2048, 4096):
        yield _memory_row("eager", total, None, device)


def _memory_row(who: str, total: int, window: int | None, device: torch.device) -> dict[str, Any]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    given: dict[str, Any] = {"who": who, "total": total, "window": window, "dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cpu":
        num_bytes = peak_bytes_apart("keel.bench.attention:memory_work", **given)
    else:
        num_bytes = _allocated(memory_work(**given, device=str(device)))
    case = Work((total,), 8, 8, window, dtype, device).case
    return {
        "case": case,
        "ours": who,
        "mib": round(num_bytes / 2**20, 1),
        "kib_per_token": round(num_bytes / total / 1024, 1),
    }


def memory_work(*, who: str, total: int, window: int | None, dtype: str, device: str = "cpu") -> Callable[[], Results]:
    """What is measured in a process of its own; a short sequence has been through it, and the layout is made."""
    kind = getattr(torch, dtype)
    short, work = (Work((size,), 8, 8, window, kind, torch.device(device)) for size in (512, total))
    (short.ours() if who == "keel" else short.eager())()
    return work.ours() if who == "keel" else work.eager()


def _allocated(function: Callable[[], Results]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _equal(work: Work, contenders: Mapping[str, Callable[[], Results]]) -> float | None:
    """The largest difference from eager (or from another kernel), values and gradients; None if there is no other."""
    names = [name for name in contenders if name not in ("keel", "stock")]
    if not names:
        return None
    mine = contenders["keel"]()
    found = [
        require_close(f"{work.case}, {name}", got, want, tolerance=TOLERANCE[work.dtype])
        for name in names
        for got, want in zip(mine, contenders[name](), strict=True)
    ]
    return max(found)


def _row(work: Work, times: Times, ours: str, peer: str, equal_to: float | None) -> dict[str, Any]:
    ratio = times.ratio(peer, ours)
    return {
        "case": work.case,
        "ours": f"{ours} ({choose_backend('auto', work.device, work.dtype, HEAD_SIZE).name})",
        "peer": peer,
        "ours_ms": round(1e3 * times.median(ours), 1),
        "peer_ms": round(1e3 * times.median(peer), 1),
        "ratio": round(ratio.median, 3),
        "low": round(ratio.low, 3),
        "high": round(ratio.high, 3),
        "equal_to": equal_to,
    }


def _finish(device: torch.device) -> Callable[[], Any]:
    return torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
