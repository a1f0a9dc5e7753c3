"""Are a mixture's experts used alike? The load-balancing loss of a router, and figures of the load itself.

The loss is Switch Transformers' (Fedus, Zoph, Shazeer 2021, arXiv 2101.03961, equations 4 to 6), for k experts a token:

    loss of a layer = E * sum over experts e of f[e] * P[e]

f[e] is how many of a token's k choices fall on e, in the mean over tokens (so f sums to k), and P[e] the mean over
tokens of the router's softmax over all experts. In perfect balance it is k, and E where one expert gets everything.
A model's loss is the mean over its layers. `transformers` computes the same of one layer; of several it takes f and P
over all layers together, under which an expert number that is overused in one layer and unused in the next is balanced.

f has no gradient and is known before the gradient is: it is counted over all tokens of an update, context included.
With it the loss is a sum over tokens, so its parts over micro-batches and ranks add up to the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Balance:
    """What is known of an update before its gradient: the loss's weight, and f of every layer over all its tokens."""

    coefficient: float
    load: torch.Tensor  # [L, E] float64, choices per token; a layer's sum to k
    num_tokens: float


def expert_counts(routes: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens of `routes [T, L, k]` chose each expert, `[L, E]` float64; an unknown choice (-1) is none."""
    num_layers = routes.shape[1]
    layers = torch.arange(num_layers, device=routes.device)[:, None]
    flat = torch.where(routes >= 0, layers * num_experts + routes, num_layers * num_experts).reshape(-1)
    counts = torch.bincount(flat, minlength=num_layers * num_experts + 1)[:-1]
    return counts.view(num_layers, num_experts).double()


def load_balancing_loss(router_logits: torch.Tensor, balance: Balance) -> torch.Tensor:
    """The part of the loss that these tokens have, a float64 scalar, without its coefficient.

    `router_logits [T, L, E]`; gradients flow through P. The parts of all tokens of `balance` add up to the loss.
    """
    shares = torch.softmax(router_logits.float(), dim=-1).double().sum(0)  # [L, E]
    num_layers, num_experts = balance.load.shape
    return (shares * balance.load).sum() * (num_experts / (num_layers * max(balance.num_tokens, 1.0)))


def load_balancing_loss_reference(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The slow twin, of all of an update's `router_logits [T, L, E]` at once, each token with its own `top_k`."""
    losses = []
    for logits in router_logits.double().unbind(1):
        shares = torch.softmax(logits, dim=-1)
        chosen = torch.zeros_like(shares).scatter_(-1, shares.topk(top_k, dim=-1).indices, 1.0)
        losses.append(logits.shape[-1] * (chosen.mean(0) * shares.mean(0)).sum())
    return torch.stack(losses).mean()


def load_metrics(counts: torch.Tensor) -> dict[str, float]:
    """Figures of the load `counts [L, E]`, from how many tokens chose each expert.

    `load_max_ratio` is the most used expert's load over the mean, `load_entropy` the entropy of the load over that of
    a balanced one, `dead_experts` how many nobody chose; over all layers the worst, the mean and the sum of these. The
    first is told of each layer too.
    """
    totals = counts.sum(-1, keepdim=True)
    if not counts.numel() or not bool((totals > 0).all()):
        return {}
    shares = counts / totals
    num_experts = counts.shape[1]
    ratios = (shares.amax(-1) * num_experts).tolist()
    entropies = torch.special.entr(shares).sum(-1) / torch.log(torch.tensor(max(num_experts, 2), dtype=torch.float64))
    dead = (counts == 0).sum(-1).tolist()
    metrics = {
        "router/load_max_ratio": max(ratios),
        "router/load_entropy": float(entropies.mean()),
        "router/dead_experts": float(sum(dead)),
    }
    return metrics | {f"router/layer_{layer:02d}/load_max_ratio": ratio for layer, ratio in enumerate(ratios)}
