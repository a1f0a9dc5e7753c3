"""The dense float64 twin of sink attention: the softmax written out, one sequence and one matrix at a time.

Quadratic, slow and differentiated by autograd alone; it shares no code with the kernels it is compared with. The sink
is a column of the score matrix, as in the model's definition, not a correction of someone's log-sum-exp.
"""

from __future__ import annotations

import torch

from keel.ops.attention.layout import Layout, Span


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T', K, D], sinks [H] -> (out [T, H, D], lse [T, H]), both float64.

    Only the spans and the window of `layout` are read. A row that sees no key is (0, s), or (0, -inf) without sinks.
    """
    num_heads = q.shape[1]
    sink = torch.full((num_heads,), float("-inf"), dtype=torch.float64, device=q.device)
    sink = sink if sinks is None else sinks.to(torch.float64)
    outs = q.new_zeros(q.shape, dtype=torch.float64)
    lses = sink.expand(q.shape[0], num_heads)
    for span in layout.spans:
        rows = torch.arange(span.query_start, span.query_start + span.num_queries, device=q.device)
        out, lse = _dense_span(q.to(torch.float64), k.to(torch.float64), v.to(torch.float64), sink, span, layout, scale)
        outs, lses = outs.index_copy(0, rows, out), lses.index_copy(0, rows, lse)
    return outs, lses


def _dense_span(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor, span: Span, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // k.shape[1]
    query = q[span.query_start :][: span.num_queries].transpose(0, 1)  # [H, n, D]
    key = k[span.key_start :][: span.num_keys].transpose(0, 1).repeat_interleave(group, 0)  # [H, m, D]
    value = v[span.key_start :][: span.num_keys].transpose(0, 1).repeat_interleave(group, 0)
    position = torch.arange(span.num_queries, device=q.device)[:, None] + span.offset
    distance = position - torch.arange(span.num_keys, device=q.device)[None, :]
    visible = distance >= 0
    if layout.window is not None:
        visible = visible & (distance < layout.window)
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
    column = sink[:, None, None].expand(-1, span.num_queries, 1)
    # Where nothing is visible and there is no sink the softmax is 0 / 0; a finite stand-in keeps autograd finite too.
    empty = ~(visible.any(1, keepdim=True) | torch.isfinite(column))
    weights = torch.softmax(torch.cat([scores, column.masked_fill(empty, 0.0)], -1), -1)[..., :-1]
    lse = torch.logsumexp(torch.cat([scores, column], -1), -1)
    return (weights @ value).transpose(0, 1), lse.transpose(0, 1)
