"""What is computed of a micro-batch, what is told of it, and what attention is told; refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.batch import MicroBatch
from keel.models.policy import PolicyModel
from keel.models.shared_rows import LEAST_SHARE, SharedAttention, share_rows
from keel.ops.attention import layout_attention, sink_attention
from keel.ops.attention.layout import MAX_BLOCK, Span
from keel.ops.gather import gather_rows

VOCAB_SIZE = 320


def batch_of(sequences, *, temperatures=(1.0,)) -> MicroBatch:
    """Whole sequences of n tokens as n - 1 rows; label temperatures go round."""
    lengths = [len(sequence) - 1 for sequence in sequences]
    rows = sum(lengths)
    around = torch.tensor(temperatures)
    return MicroBatch(
        input_ids=torch.tensor([token for sequence in sequences for token in sequence[:-1]]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.tensor([token for sequence in sequences for token in sequence[1:]]),
        loss_mask=torch.ones(rows, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        sequence_to_trajectory=torch.arange(len(lengths)),
        policy_version=torch.zeros(rows, dtype=torch.int32),
        temperature=around.repeat(rows // len(around) + 1)[:rows],
        turn=torch.zeros(rows, dtype=torch.int32),
        max_seqlen=max(lengths),
    )


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=2, max_size=7)


@given(SEQUENCES, st.lists(st.sampled_from([0.5, 1.0]), min_size=1, max_size=3))
def test_every_row_finds_its_own_state_and_its_own_label(sequences, temperatures):
    batch = batch_of(sequences, temperatures=temperatures)
    shared = share_rows(batch, None, "on")
    pasts, asked = [], []
    for sequence in sequences:
        pasts += [tuple(sequence[: place + 1]) for place in range(len(sequence) - 1)]
        asked += [tuple(sequence[: place + 2]) for place in range(len(sequence) - 1)]
    if len(set(pasts)) == len(pasts):
        assert shared is None
        return
    assert shared.num_shared == len(pasts) - len(set(pasts))
    for row, computed in enumerate(shared.row_to_computed.tolist()):
        assert pasts[shared.computed[computed]] == pasts[row]
    for row, told in enumerate(shared.row_to_told.tolist()):
        other = int(shared.told[told])
        assert (asked[other], batch.temperature[other]) == (asked[row], batch.temperature[row])


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=4),
    st.sampled_from([None, 1, 7, 33]),
)
@settings(max_examples=25)
def test_attention_of_shared_rows_is_that_of_whole_sequences(parts, window):
    """Each sequence is a part of one prompt and some rows of its own; a first one has all of the prompt."""
    generator = torch.Generator().manual_seed(0)
    parts = [(0, 40 + parts[0][1]), *((prompt, own) for prompt, own in parts)]
    spans, keys, num_rows, num_keys = [], [], 0, 0
    for prompt, own in parts:
        spans.append(Span(num_rows, own, num_keys, prompt + own, prompt))
        keys.append(torch.cat((torch.arange(prompt), torch.arange(num_rows, num_rows + own))))
        num_rows, num_keys = num_rows + own, num_keys + prompt + own
    shared = SharedAttention(tuple(spans), torch.cat(keys), num_rows)
    q, k, v = (torch.randn(num_rows, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator, dtype=torch.float64)
    found = []
    for whole in (False, True):
        leaves = [each.clone().requires_grad_() for each in (q, k, v, sinks)]
        rows = [gather_rows(each, shared.key_rows) for each in leaves[1:3]]
        if whole:
            starts = torch.tensor([0, *(span.num_keys for span in spans)]).cumsum(0)
            query = gather_rows(leaves[0], shared.key_rows)
            options = {"cu_seqlens": starts, "max_seqlen": 200, "scale": 0.3, "window": window}
            out = sink_attention(query, *rows, leaves[3], **options, backend="reference")
            own = [torch.arange(start + span.offset, start + span.num_keys) for start, span in zip(starts, spans)]  # noqa: B905
            out = out[torch.cat(own)]
        else:
            out = layout_attention(leaves[0], *rows, leaves[3], layout=shared.layout(window), scale=0.3)
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_long_reply_is_cut_into_blocks_whose_masks_are_not_kept():
    own = 2 * MAX_BLOCK + 100
    layout = SharedAttention((Span(0, own, 0, 50 + own, 50),), torch.arange(50 + own), own).layout(None)
    assert [bucket.query_index.shape[0] for bucket in layout.buckets] == [MAX_BLOCK, MAX_BLOCK, 112]
    for bucket in layout.buckets:
        assert bucket.mask(torch.float32).shape[0] <= MAX_BLOCK
        assert not bucket.masks


def test_auto_shares_from_a_tenth_on():
    prompt = list(range(100, 110))
    alike = batch_of([[*prompt, *range(40 + 40 * i, 80 + 40 * i)] for i in range(2)])
    assert share_rows(alike, None, "auto").num_shared >= LEAST_SHARE * alike.num_tokens
    unlike = batch_of([[*prompt, *range(150 * i, 150 + 150 * i)] for i in range(2)])
    assert share_rows(unlike, None, "auto") is None
    assert share_rows(unlike, None, "on").num_shared == 10
    assert share_rows(alike, None, "off") is None


def test_rows_at_other_positions_or_with_other_routes_are_not_shared():
    batch = batch_of([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    assert share_rows(batch, None, "on").num_shared == 4
    moved = dataclasses.replace(batch, positions=batch.positions + torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]))
    assert share_rows(moved, None, "on").num_shared == 2
    routes = torch.zeros(8, 2, 1, dtype=torch.int32)
    routes[7, 1] = 3
    assert share_rows(batch, routes, "on").num_shared == 3
    # What the engine said of them decides even where a score pass has chosen since.
    engines = routes.clone()
    engines[5:, 0] = -1
    routed = dataclasses.replace(batch, routed_experts=engines)
    assert share_rows(routed, torch.zeros_like(routes), "on").num_shared == 1
    assert share_rows(routed, None, "on").num_shared == 4, "nothing is replayed"


def test_what_cannot_gather_keys_shares_nothing(tiny_checkpoint):
    path = tiny_checkpoint("qwen3", num_hidden_layers=2)
    batch = batch_of([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    policy = PolicyModel.load(path)
    assert policy(batch, share_prefixes="auto").computed.tolist() == [0, 1, 2, 3]
    policy.model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in policy.sharing_problem()
    policy.model.config.layer_types = ["full_attention", "full_attention"]
    del policy.model.model.layers[1].self_attn.layer_idx
    assert "1 of 2 layers" in policy.sharing_problem()
    assert policy(batch, share_prefixes="auto").computed is None
    with pytest.raises(ValueError, match="1 of 2 layers"):
        policy(batch, share_prefixes="on")
    policy.exact = True
    assert "exact" in policy.sharing_problem()
    assert PolicyModel.load(path, attention="eager").sharing_problem().startswith("attention = 'eager'")


def test_a_layer_that_does_not_ask_is_found_out(tiny_checkpoint, monkeypatch):
    policy = PolicyModel.load(tiny_checkpoint("qwen3", num_hidden_layers=2))
    attention = policy.model.model.layers[1].self_attn
    plain = attention.forward
    monkeypatch.setattr(
        attention,
        "forward",
        lambda *args, keel_shared, **kwargs: plain(*args, cu_seq_lens_q=torch.tensor([0, 16]), **kwargs),
    )
    with pytest.raises(RuntimeError, match="1 of 2 layers"):
        policy(batch_of([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]), share_prefixes="on")


def test_gathered_rows_add_their_gradients_up_in_float32():
    """A thousand times 1: in bfloat16, added one by one, the sum would stop at 256."""
    rows = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(rows, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert rows.grad[0].item() == 1000.0
    assert rows.grad[1].item() == 0.0
    assert rows.grad.dtype == torch.bfloat16
