"""A third opinion: the model in plain `transformers`, eager attention, none of Keel's operators or patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.models.info import ModelInfo, model_info
from keel.preflights.reference_changes import (
    Change,
    changed_parameters,
    parameters_set_to,
    rope_changed,
    windows,
)

MASK_ELEMENTS = 32_000_000
"""Attention scores (batch x heads x n x n) that one pass may hold: 128 MB in float32."""
SHORTEST_SHARE = 0.7
"""The shortest sequence of a pass has at least this share of the tokens of the longest."""


@dataclass(frozen=True)
class Feed:
    """Tokens to feed; `wanted` are the rows whose logits are asked for (row t predicts token t + 1).

    `positions` are 0, 1, 2, ... unless given. `routes [n, moe layers, k]` int64 are experts to use instead of the
    router's choice, -1 where the choice stays its own.
    """

    token_ids: tuple[int, ...]
    wanted: tuple[int, ...]
    positions: tuple[int, ...] | None = None
    routes: torch.Tensor | None = None


class Reference:
    """The model of a directory as `transformers` alone computes it; float32 unless told otherwise."""

    def __init__(self, model: Any) -> None:
        """`model` is a causal model of `transformers` with eager attention, in evaluation mode."""
        self.model = model
        self.info: ModelInfo = model_info(model.config)
        self.earlier: tuple[Mapping[str, torch.Tensor], ...] = ()
        self.attentions = [module for module in model.modules() if hasattr(module, "q_proj")]
        self.routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self.num_passes = 0

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, served_as: str = "float32") -> Reference:
        """Read a Hugging Face directory and compute in `dtype`.

        Weights are rounded first to `served_as`, the type that the stack serves them in. Raises what `transformers`
        raises for a path that is no model.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, served_as), attn_implementation="eager", experts_implementation="eager"
        )
        return cls(model.to(dtype).eval())

    @property
    def has_sinks(self) -> bool:
        return any(name.endswith("sinks") for name, _ in self.model.named_parameters())

    @torch.no_grad()
    def logits(self, feeds: Sequence[Feed], changes: Sequence[Change] = ()) -> torch.Tensor:
        """Logits `[rows, V]` of all wanted rows, feed after feed, in the model's type."""
        self.num_passes += 1
        with ExitStack() as stack:
            stack.enter_context(rope_changed(self.model, changes))
            new = changed_parameters(self.model, changes, self.earlier)
            stack.enter_context(parameters_set_to(self.model, new))
            for change in changes:
                if change.kind in ("bfloat16", "float64"):
                    stack.enter_context(_computing_in(self.model, getattr(torch, change.kind)))
            layer_windows = windows(self.info.layer_windows, changes)
            order = sorted(range(len(feeds)), key=lambda place: len(feeds[place].token_ids))
            parts = [self._pass(group, layer_windows) for group in self._groups([feeds[place] for place in order])]
        if not parts:
            return torch.zeros(0, self.info.vocab_size)
        sizes = [len(feeds[place].wanted) for place in order]
        of_feed = dict(zip(order, torch.cat(parts).float().split(sizes), strict=True))
        return torch.cat([of_feed[place] for place in range(len(feeds))])

    @torch.no_grad()
    def router_logits(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        """For each feed the logits `[n, moe layers, E]` of its routers; empty if the family's routers are unknown."""
        found: list[torch.Tensor] = []
        for feed in feeds:
            seen: list[torch.Tensor] = []
            with ExitStack() as stack:
                for router in self.routers:
                    stack.enter_context(_hook(router.register_forward_hook(_noting(seen))))
                self._pass([feed], self.info.layer_windows)
            found.append(torch.stack(seen, dim=1))
        return found

    def _groups(self, feeds: Sequence[Feed]) -> Iterator[list[Feed]]:
        """Feeds that fit one pass together and waste little on padding, in their order (by length)."""
        group: list[Feed] = []
        longest = 0
        for feed in feeds:
            longest = max(longest, len(feed.token_ids))
            too_many = (len(group) + 1) * self.info.num_heads * longest**2 > MASK_ELEMENTS
            if group and (too_many or len(group[0].token_ids) < SHORTEST_SHARE * longest):
                yield group
                group, longest = [], len(feed.token_ids)
            group.append(feed)
        if group:
            yield group

    def _pass(self, feeds: Sequence[Feed], layer_windows: Sequence[int | None]) -> torch.Tensor:
        """One batch, padded at the right, where no causal row looks. -> `[rows, V]`"""
        longest = max(len(feed.token_ids) for feed in feeds)
        ids = torch.zeros((len(feeds), longest), dtype=torch.long)
        positions = torch.arange(longest).repeat(len(feeds), 1)
        for row, feed in enumerate(feeds):
            ids[row, : len(feed.token_ids)] = torch.tensor(feed.token_ids)
            if feed.positions is not None:
                positions[row, : len(feed.token_ids)] = torch.tensor(feed.positions)
        masks = {window: self._mask(longest, window) for window in set(layer_windows)}
        with ExitStack() as stack:
            for attention, window in zip(self.attentions, layer_windows, strict=True):
                hook = attention.register_forward_pre_hook(_masking(masks[window]), with_kwargs=True)
                stack.enter_context(_hook(hook))
            if any(feed.routes is not None for feed in feeds):
                for place, router in enumerate(self.routers):
                    wanted = _routes_of(feeds, place, longest)
                    stack.enter_context(_hook(router.register_forward_hook(_routing(wanted, self.model.config))))
            hidden = self.model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        rows = [hidden[row, list(feed.wanted)] for row, feed in enumerate(feeds)]
        logits: torch.Tensor = self.model.get_output_embeddings()(torch.cat(rows))
        return logits

    def _mask(self, length: int, window: int | None) -> torch.Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        seen = (distance >= 0) & (distance < (window or length))
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(length, length, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights and activations in `dtype` within the block; the weights come back as they were, to the bit."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = before[name]


def _masking(mask: torch.Tensor) -> Callable[..., Any]:
    def put_in(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    return put_in


def _noting(seen: list[torch.Tensor]) -> Callable[..., None]:
    def note(_: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        seen.append(output[0].detach())

    return note


def _routes_of(feeds: Sequence[Feed], place: int, longest: int) -> torch.Tensor:
    """`[B * n, k]` experts of the router number `place`, -1 where none is given."""
    k = next(feed.routes.shape[2] for feed in feeds if feed.routes is not None)
    wanted = torch.full((len(feeds), longest, k), -1, dtype=torch.long)
    for row, feed in enumerate(feeds):
        if feed.routes is not None:
            wanted[row, : len(feed.routes)] = feed.routes[:, place]
    return wanted.flatten(0, 1)


def _routing(wanted: torch.Tensor, config: Any) -> Callable[..., Any]:
    """Replace a router's choice; weights follow from its own logits, by its family's formula."""
    over_all = str(config.model_type) != "gpt_oss"
    normalized = bool(getattr(config, "norm_topk_prob", True))

    def route(_: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, scores, experts = output
        given = (wanted >= 0).all(dim=-1, keepdim=True)
        chosen = torch.where(given, wanted, experts)
        if over_all:
            weights = logits.float().softmax(dim=-1).gather(-1, chosen)
            weights = weights / weights.sum(dim=-1, keepdim=True) if normalized else weights
        else:
            weights = logits.gather(-1, chosen).softmax(dim=-1)
        return logits, torch.where(given, weights.to(scores.dtype), scores), chosen

    return route
