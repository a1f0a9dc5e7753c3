"""The trainer's own layers, run again one by one on the activations that reached them, beside slow twins.

What a layer was called with is recorded during a real pass of the trainer, masks and all, so that what is compared is
what the trainer does. The twins are the dense float64 attention and the plain loop over experts of `keel.ops`; window
and sinks of the dense twin are those of the model's configuration and parameters, whatever the layer passes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from keel.ops.attention.layout import packed_layout
from keel.ops.attention.reference import dense_attention
from keel.preflights.context import Context, SkippedError
from keel.preflights.probes import random_tokens
from keel.preflights.stack import ScoredSequence

DENSE = "keel_preflight_dense"


@dataclass(frozen=True)
class Call:
    """A module and what it was called with, in layer order."""

    layer: int
    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The module's output for `hidden` in the place of the hidden states it was called with."""
        if "hidden_states" in self.kwargs:
            out = self.module(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            out = self.module(hidden, *self.args[1:], **self.kwargs)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    @property
    def bounds(self) -> torch.Tensor:
        """`[S + 1]` int32, the row where each sequence of it starts: the first is ours, others are padding's."""
        given = self.kwargs.get("cu_seq_lens_q")
        whole = torch.tensor([0, self.hidden.shape[-2]], dtype=torch.int32)
        return whole if given is None else given.detach().cpu().to(torch.int32)

    def without_mask(self) -> Call:
        """The same call without a word of who sees whom: for a twin that knows it by itself."""
        said = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        kept = {name: value for name, value in self.kwargs.items() if name not in said}
        return Call(self.layer, self.name, self.module, self.args, {**kept, "attention_mask": None})

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states it was called with, `[1, T, Hd]` or `[T, Hd]`."""
        found: torch.Tensor = self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]
        return found.detach()


def layer_sequence(context: Context) -> ScoredSequence:
    """One sequence of random tokens that crosses the window twice, as far as that is affordable; all but 4 drawn."""
    windows = [window for window in context.stack.trainer.info.layer_windows if window]
    size = min(context.plan.max_sequence_tokens, 2 * max(windows) + 21 if windows else 64)
    tokens = np.array(random_tokens(context.stack, random.Random(context.plan.seed), size), np.int64)
    return ScoredSequence(tokens, np.arange(size) >= 4)


def attention_calls(context: Context) -> list[Call]:
    """Every attention module's call. Raises SkippedError for a family whose attention modules are not known."""
    modules = {name: module for name, module in context.stack.trainer.model.named_modules() if _is_attention(module)}
    if len(modules) != context.stack.trainer.info.num_layers:
        raise SkippedError(f"the attention modules of {context.stack.trainer.info.model_type} are not known")
    return _recorded(context, modules)


def experts_calls(context: Context) -> list[Call]:
    """Every experts module's call. Raises SkippedError if there is none."""
    modules = {
        name: module
        for name, module in context.stack.trainer.model.named_modules()
        if hasattr(module, "gate_up_proj") and hasattr(module, "is_transposed")
    }
    if not modules:
        raise SkippedError("the model has no experts")
    return _recorded(context, modules)


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "layer_idx"))


def _recorded(context: Context, modules: Mapping[str, nn.Module]) -> list[Call]:
    calls: dict[str, Call] = {}

    def note(name: str, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = Call(layer, name, module, args, kwargs)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name, layer), with_kwargs=True)
        for layer, (name, module) in enumerate(modules.items())
    ]
    try:
        context.stack.trainer.score_alone(layer_sequence(context))
    finally:
        for handle in handles:
            handle.remove()
    return [calls[name] for name in modules if name in calls]


@dataclass(frozen=True)
class Heads:
    """What a layer's attention works on: `q [T, H, D]`, `k` and `v` `[T, K, D]`, `sinks [H]` or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    scale: float


def captured_heads(context: Context, call: Call) -> Heads:
    """The heads of a recorded call, rotary positions applied."""
    seen: list[Heads] = []
    with torch.no_grad(), dense_twin(context, call, seen) as twin:
        twin.run(call.hidden)
    return seen[0]


@contextmanager
def dense_twin(context: Context, call: Call, seen: list[Heads]) -> Iterator[Call]:
    """In this context the call that is yielded computes the dense twin of `call`; what it works on is added to `seen`.

    Window and sequences are those of the configuration and of `call`, sinks the module's parameter.
    """
    from transformers import AttentionInterface

    layout = packed_layout(call.bounds, context.stack.trainer.info.layer_windows[call.layer])

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        del args
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        sinks = getattr(module, "sinks", None)
        seen.append(Heads(q, k, v, sinks, scale))
        out = dense_attention(q, k, v, sinks, layout, scale)[0]
        return out.to(query.dtype).unsqueeze(0), None

    AttentionInterface.register(DENSE, attend)
    config: Any = context.stack.trainer.model.config
    before = config._attn_implementation
    config._attn_implementation = DENSE
    try:
        yield call.without_mask()
    finally:
        config._attn_implementation = before


def value_and_gradients(
    call: Call, direction: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of its product with `direction` by the hidden states and `parameters`."""
    hidden = call.hidden.clone().requires_grad_(True)
    with torch.enable_grad():
        out = call.run(hidden)
        wanted = [hidden, *parameters.values()]
        found = torch.autograd.grad((out * direction.view_as(out)).sum(), wanted)
    names = ["hidden", *parameters]
    gradients = {name: grad.detach() for name, grad in zip(names, found, strict=True)}
    return out.detach(), gradients


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is right; infinite where something is not finite."""
    difference, size = (found.double() - right.double()).norm(), right.double().norm()
    ratio = float(difference / size.clamp_min(1e-30)) if float(size) > 0 else float(difference)
    return ratio if np.isfinite(ratio) else float("inf")
