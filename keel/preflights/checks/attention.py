"""The trainer's attention: against its dense twin in every layer, its sinks, its windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from keel.ops.attention.backends import REFERENCE, usable_backends
from keel.ops.attention.function import layout_attention
from keel.ops.attention.layout import packed_layout
from keel.preflights.checks.layers import (
    Call,
    attention_calls,
    captured_heads,
    dense_twin,
    layer_sequence,
    relative,
    value_and_gradients,
)
from keel.preflights.context import Context, SkippedError, check
from keel.preflights.result import Check

TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 0.05}
"""Relative error of a layer's output or gradient that rounding in the type makes at most: some hundred of its units in
float32 and float64, whose sums are long, and some six in bfloat16, whose sums are kept in float32."""
FIX_ATTENTION = 'use an attention that honours windows and sinks: "keel", or "eager" in plain transformers'
NO_SINK = -1e4


def check_attention(context: Context) -> Iterator[Check]:
    """Does every layer's attention, masks and all, compute what the dense twin does, and its gradient?"""
    dtype = context.stack.source.dtype
    tolerance = TOLERANCE[dtype]
    calls = attention_calls(context)
    errors = []
    for call in calls:
        parameters = {name: p for name, p in call.module.named_parameters() if name == "sinks" and p.requires_grad}
        generator = torch.Generator().manual_seed(call.layer)
        shape = call.hidden.shape
        direction = torch.randn(shape, generator=generator).to(call.hidden)
        out, gradients = value_and_gradients(call, direction, parameters)
        with dense_twin(context, call, []) as right:
            twin, right_gradients = value_and_gradients(right, direction, parameters)
        errors.append(
            {
                "layer": call.layer,
                "value": relative(out, twin),
                **{f"d_{name}": relative(grad, right_gradients[name]) for name, grad in gradients.items()},
            }
        )
    worst = max(errors, key=lambda row: max(value for name, value in row.items() if name != "layer"))
    what, size = max(((name, value) for name, value in worst.items() if name != "layer"), key=lambda item: item[1])
    yield check(
        "attention",
        "attention equals its dense twin",
        "pass" if size <= tolerance else "fail",
        f"the largest relative error over {len(calls)} layers, on the model's own activations, is {size:.1e} "
        f"({what} of layer {worst['layer']}); attention is {context.stack.trainer.attention!r}",
        figure=size,
        threshold=tolerance,
        unit="relative",
        fix=FIX_ATTENTION,
        layers=errors,
    )


def check_backends(context: Context) -> Iterator[Check]:
    """Which of Keel's kernels take this stack's tensors; the one in use is held against the twin by `attention`."""
    stack = context.stack
    if stack.trainer.attention != "keel":
        raise SkippedError(f"the trainer's attention is {stack.trainer.attention!r}, not one of Keel's kernels")
    calls = attention_calls(context)
    parameter = next(stack.trainer.model.parameters())
    able = usable_backends(parameter.device, parameter.dtype, getattr(calls[0].module, "head_dim", None))
    tolerance = TOLERANCE[stack.source.dtype]
    errors = {each.name: max(_backend_error(context, call, each.name) for call in calls) for each in able}
    name, size = max(errors.items(), key=lambda item: item[1])
    yield check(
        "attention_backends",
        "every attention kernel that could be used agrees",
        "pass" if size <= tolerance else "fail",
        f"kernels for {stack.source.dtype} on {parameter.device.type}: {', '.join(errors)}; the largest relative error "
        f"is {size:.1e} ({name})",
        figure=size,
        threshold=tolerance,
        unit="relative",
        fix="report the kernel and the sizes of the model; choose another device or type meanwhile",
        errors=errors,
    )


def _backend_error(context: Context, call: Call, backend: str) -> float:
    """The largest relative error of one kernel, values and gradients, on a layer's own query, key and value."""
    heads = captured_heads(context, call)
    window = context.stack.trainer.info.layer_windows[call.layer]
    layout = packed_layout(call.bounds, window)
    direction = torch.randn(heads.q.shape, generator=torch.Generator().manual_seed(1)).to(heads.q)
    found = {}
    for name in (backend, REFERENCE):
        given = [each for each in (heads.q, heads.k, heads.v, heads.sinks) if each is not None]
        leaves = [each.detach().clone().requires_grad_(True) for each in given]
        out = layout_attention(
            leaves[0],
            leaves[1],
            leaves[2],
            leaves[3] if len(leaves) == 4 else None,
            layout=layout,
            scale=heads.scale,
            backend=name,
        )
        found[name] = [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]
    return max(relative(a, b) for a, b in zip(found[backend], found[REFERENCE], strict=True))


def check_sinks(context: Context) -> Iterator[Check]:
    """Are there sinks where there should be, does the trainer use them, and do they get a gradient, in every layer?"""
    stack = context.stack
    expected = stack.trainer.info.model_type == "gpt_oss"
    sinks = {name: p for name, p in stack.trainer.model.named_parameters() if name.endswith("sinks")}
    title = "attention sinks are used and learned by the trainer"
    if not sinks and not expected:
        raise SkippedError(f"{stack.trainer.info.model_type} has no attention sinks")
    if not sinks:
        yield check("sinks", title, "fail", "a GPT-OSS model without a parameter called sinks", fix=FIX_ATTENTION)
        return
    sequence = layer_sequence(context)
    before = stack.trainer.score_alone(sequence).logprobs
    changes: dict[str, float] = {}
    for name, parameter in sinks.items():
        with _without(parameter):
            changes[name] = float(np.nanmean(np.abs(stack.trainer.score_alone(sequence).logprobs - before)))
    gradients = stack.trainer.loss_gradient([sequence])
    unused = [name for name, change in changes.items() if not change > 0]
    unlearned = [name for name in sinks if not gradients.get(name, 0.0) > 0]
    problem = ""
    if unused:
        problem = f"without them nothing changes, so they are not used: {_layers(unused)}"
    elif unlearned:
        problem = f"they get no gradient: {_layers(unlearned)}"
    least = min(changes.values())
    yield check(
        "sinks",
        title,
        "fail" if problem else "pass",
        problem or f"log-probs change by {least:.1e} nats or more without the sinks of a layer; all get a gradient",
        figure=least,
        threshold=0.0,
        unit="nats",
        fix=FIX_ATTENTION,
        changes=changes,
        gradients={name: gradients.get(name, 0.0) for name in sinks},
    )


def check_windows(context: Context) -> Iterator[Check]:
    """Does a token see exactly the window of its layer, or the whole past where there is none?"""
    calls = attention_calls(context)
    windows = context.stack.trainer.info.layer_windows
    faults = []
    tried = 0
    for call, window in zip(calls, windows, strict=True):
        last = int(call.bounds[1]) - 1
        inside = [0, last] if window is None else [max(0, last - window + 1), last]
        outside = [] if window is None or window > last else [last - window, 0]
        with torch.no_grad():
            before = call.run(call.hidden)
            for place in (*inside, *outside):
                changes = [call.run(moved) - before for moved in _replaced(call.hidden, place, last)]
                change = max(each[..., last, :].abs().max().item() for each in changes)
                tried += 1
                if (change > 0) != (place in inside):
                    seen = "is seen" if change > 0 else "is not seen"
                    faults.append(f"layer {call.layer} (window {window}): the token {last - place} back {seen}")
                if place and max(each[..., :place, :].abs().max().item() for each in changes) > 0:
                    faults.append(f"layer {call.layer}: a token is seen by one before it")
    kinds = ", ".join(sorted({"full" if window is None else f"window {window}" for window in windows}))
    yield check(
        "windows",
        "every layer of the trainer sees its window, and no more",
        "fail" if faults else "pass",
        "; ".join(faults[:3])
        or f"{tried} tokens at the edges of {len(calls)} layers ({kinds}) are seen or not, rightly",
        figure=float(len(faults)),
        threshold=0.0,
        unit="edges",
        fix=FIX_ATTENTION,
        faults=faults,
    )


def _replaced(hidden: torch.Tensor, place: int, last: int) -> Iterator[torch.Tensor]:
    """`hidden [.., n, Hd]` with another state at `place`, in several ways.

    A trained head may give a token so little weight that bfloat16 does not show one change of it; a large state, and
    one like that of the row that looks (`last`), draw attention whatever the head has learned.
    """
    own, looking = hidden[..., place, :], hidden[..., last, :]
    for state in (-own.roll(1, -1), 4 * own.roll(1, -1), -4 * own, 4 * looking, -4 * looking):
        moved = hidden.clone()
        moved[..., place, :] = state
        yield moved


@contextmanager
def _without(sinks: nn.Parameter) -> Iterator[None]:
    """In this context the sinks have no weight in the softmax."""
    before = sinks.detach().clone()
    with torch.no_grad():
        sinks.fill_(NO_SINK)
    try:
        yield
    finally:
        with torch.no_grad():
            sinks.copy_(before)


def _layers(names: list[str]) -> str:
    found = [name.split("layers.")[-1].split(".")[0] for name in names]
    return f"layer {', '.join(found)}"
