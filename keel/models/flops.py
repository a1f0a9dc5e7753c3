"""How many floating-point operations a model's tokens take, from its parameters and positions.

An addition and a multiplication are two operations. Of one token the forward pass takes

    2 x (weights that multiply it)  +  sum over layers of 4 x H x D x (keys it sees)

Weights that multiply it are all matrices but the input embedding, which is looked up; of E experts the k that run. A
key is multiplied twice, for the score and for the value. A backward pass takes the operations of the forward pass once
for what flows through, and once more for the gradients of weights that learn (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1; with attention as in Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Softmax, norms, gates and
whatever is recomputed are not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from keel.models.info import ModelInfo


@dataclass(frozen=True)
class FlopCount:
    """What one token takes: weights that multiply it, those of them that learn, and what a key costs by window."""

    weights: float
    trained: float
    key_cost: int  # 4 x H x D
    windows: tuple[tuple[int | None, int], ...]  # a window (None: all keys) and how many layers have it

    @classmethod
    def of(cls, model: nn.Module, info: ModelInfo) -> FlopCount:
        """Count the parameters of a `transformers` model, before it is sharded or after."""
        looked_up = None if info.tied_embeddings else model.get_input_embeddings().weight  # type: ignore[operator]
        weights = trained = 0.0
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or parameter is looked_up or name.endswith("bias"):
                continue
            running = info.top_k / info.num_experts if ".experts." in f".{name}" else 1.0
            weights += parameter.numel() * running
            trained += parameter.numel() * running * parameter.requires_grad
        counted = Counter(info.layer_windows)
        return cls(weights, trained, 4 * info.num_heads * info.head_dim, tuple(counted.items()))

    def training(self, positions: torch.Tensor) -> float:
        """Operations of a forward and a backward pass over tokens at `positions [T]`."""
        keys = sum(
            layers * int((positions + 1 if window is None else (positions + 1).clamp(max=window)).sum())
            for window, layers in self.windows
        )
        return positions.numel() * (4 * self.weights + 2 * self.trained) + 3.0 * self.key_cost * keys
