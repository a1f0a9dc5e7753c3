"""Sums and maxima over loss tokens, kept as tensors until an update is over: one transfer, one reduction over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from keel.algo.reduce import masked_max, masked_sum
from keel.dist.ranks import Ranks


@dataclass
class Stats:
    """Named running sums and maxima, float64 scalars. All ranks must add the same names in the same order."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
    load: torch.Tensor | None = None  # [L, E] how many tokens chose each expert

    def add(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add `values [T]` where `mask [T]`."""
        self.add_total(name, masked_sum(values.detach(), mask))

    def add_total(self, name: str, total: torch.Tensor) -> None:
        """Add a scalar."""
        total = total.detach().double()
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def add_load(self, counts: torch.Tensor) -> None:
        """Add `counts [L, E]`."""
        self.load = counts if self.load is None else self.load + counts

    def peak(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Largest of non-negative `values [T]` where `mask [T]`; a NaN is infinite, for a maximum must not lose it."""
        value = masked_max(values.detach(), mask)
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    def collect(self, ranks: Ranks) -> tuple[dict[str, float], dict[str, float]]:
        """(sums, maxima) over all ranks, as floats."""
        sums = ranks.sum(_stack(self.sums, ranks.device)).tolist()
        maxima = ranks.max(_stack(self.maxima, ranks.device)).tolist()
        return dict(zip(self.sums, sums, strict=True)), dict(zip(self.maxima, maxima, strict=True))


def _stack(values: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack(list(values.values())) if values else torch.zeros(0, dtype=torch.float64, device=device)


def ratio_deviation(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[T] `|exp(logprobs - other) - 1|`: exactly 0 where the two are equal (two -inf are), infinite for a NaN."""
    deviation = torch.expm1(logprobs.detach() - other.detach()).abs()
    deviation = torch.where(logprobs == other, torch.zeros_like(deviation), deviation)
    return torch.nan_to_num(deviation, nan=torch.inf, posinf=torch.inf)
