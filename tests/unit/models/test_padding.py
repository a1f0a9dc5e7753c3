"""Padding rows: behind the real ones, in sequences of their own."""

from __future__ import annotations

import pytest
import torch

from keel.batch import MicroBatch
from keel.models.padding import pad_rows
from keel.models.policy import PolicyModel
from keel.models.tiny import build_tiny_model
from keel.ops.matmul import padded_rows

VOCAB = 300


def make_micro_batch(lengths) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return MicroBatch(
        input_ids=torch.randint(0, VOCAB, (total,), generator=generator),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.randint(0, VOCAB, (total,), generator=generator),
        loss_mask=torch.ones(total, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        sequence_to_trajectory=torch.arange(len(lengths)),
        policy_version=torch.zeros(total, dtype=torch.int32),
        temperature=torch.rand(total, generator=generator) + 0.5,
        turn=torch.zeros(total, dtype=torch.int32),
        max_seqlen=max(lengths),
    )


@pytest.mark.parametrize("lengths", [(3,), (16,), (5, 9), (40, 61, 70), (7,) * 40])
def test_padding_is_regular_and_restarts_like_sequences(lengths):
    batch = make_micro_batch(lengths)
    rows = pad_rows(batch, None)
    total = sum(lengths)
    assert len(rows.input_ids) == padded_rows(total)
    cu_seqlens = rows.attention["cu_seq_lens_q"]
    assert torch.equal(rows.attention["cu_seq_lens_k"], cu_seqlens)
    for name in ("input_ids", "positions", "labels", "temperature", "cu_seqlens"):
        padded, real = cu_seqlens if name == "cu_seqlens" else getattr(rows, name), getattr(batch, name)
        assert torch.equal(padded[: len(real)], real)
        assert padded.dtype == real.dtype
    spans = cu_seqlens.diff()
    assert cu_seqlens[-1] == len(rows.input_ids) == len(rows.labels) == len(rows.temperature)
    assert spans.min() >= 1
    assert spans.max() <= batch.max_seqlen
    expected = torch.cat([torch.arange(int(span)) for span in spans])
    assert torch.equal(rows.positions, expected)
    assert (rows.temperature > 0).all()


def test_outputs_have_the_real_rows_only_and_padding_gives_no_gradient(tmp_path, monkeypatch):
    build_tiny_model("gpt_oss", tmp_path, vocab_size=VOCAB, seed=1)
    batch = make_micro_batch((9, 20, 14))
    results = []
    for padded in (True, False):
        if not padded:
            monkeypatch.setattr("keel.models.padding.padded_rows", lambda count: count)
        policy = PolicyModel.load(tmp_path, dtype="float64")
        outputs = policy(batch, with_routes=True, with_margins=True)
        assert len(outputs.logprobs) == len(outputs.entropy) == len(outputs.routes) == len(outputs.route_margins) == 43
        outputs.logprobs.sum().backward()
        results.append([outputs.logprobs.detach(), *(parameter.grad for parameter in policy.parameters())])
    for ours, unpadded in zip(*results, strict=True):
        torch.testing.assert_close(ours, unpadded, rtol=1e-10, atol=1e-11)
