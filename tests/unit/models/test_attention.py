"""The "keel" attention implementation against transformers' own attention, model by model, mask by mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StaticCache,
)

from keel.models import attention
from keel.models.attention_mask import AttentionMaskError

attention.register()
LENGTH = 23
SIZES = {
    "vocab_size": 83,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
}
KINDS = ["full_attention", "sliding_attention", "full_attention"]


def config(family: str) -> PretrainedConfig:
    if family == "gpt_oss":
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        moe = {"num_local_experts": 5, "num_experts_per_tok": 2}
        return GptOssConfig(
            **SIZES, **moe, num_hidden_layers=3, sliding_window=6, layer_types=KINDS, rope_parameters=rope
        )
    if family == "qwen3":
        return Qwen3Config(**SIZES, num_hidden_layers=3, use_sliding_window=True, sliding_window=6, layer_types=KINDS)
    if family == "llama":
        return LlamaConfig(**SIZES, num_hidden_layers=2)
    moe = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 36}
    return Qwen3MoeConfig(**SIZES, **moe, num_hidden_layers=2)


class ExactNorm(nn.Module):
    """RMS norm in the input's own type. The models' own rounds to float32, which would hide errors below 1e-8."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.double()), eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)


def models(family: str) -> tuple[nn.Module, nn.Module]:
    """The same float64 weights twice: transformers' own attention, and keel.

    That is eager for GPT-OSS; the other families' eager rounds its softmax to float32, so there it is sdpa.
    """
    torch.manual_seed(1)
    made = config(family)
    made._experts_implementation = "eager"
    own = "eager" if family == "gpt_oss" else "sdpa"
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(made), attn_implementation=own).double().eval()
    for name, module in list(theirs.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent = theirs.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], ExactNorm(module.weight.data, module.variance_epsilon))
        if hasattr(module, "sinks"):
            nn.init.normal_(module.sinks, std=3.0)
    keel = copy.deepcopy(theirs)
    keel.set_attn_implementation("keel")
    assert {layer.self_attn.config._attn_implementation for layer in keel.model.layers} == {"keel"}
    assert theirs.config._attn_implementation == own
    return theirs, keel


FAMILIES = ["gpt_oss", "qwen3", "qwen3_moe", "llama"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return models(request.param)


@pytest.fixture(scope="module")
def gpt_oss() -> tuple[nn.Module, nn.Module]:
    return models("gpt_oss")


def tokens(rows: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 83, (rows, length), generator=torch.Generator().manual_seed(3))


def padding(side: str) -> torch.Tensor:
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    for row, count in ((1, 4), (2, 16), (3, LENGTH - 1)):
        mask[row, slice(0, count) if side == "left" else slice(LENGTH - count, None)] = 0
    return mask if side in ("left", "right") else torch.ones_like(mask)


def loss_gradients(model: nn.Module, real: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits at the real tokens and the gradients of all parameters for a fixed weighting of them."""
    model.zero_grad()
    logits = model(use_cache=False, **inputs).logits[real.bool()]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    (logits * weight).sum().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("side", ["left", "left with positions", "right", "none"])
def test_padded_batches_equal_transformers_at_real_tokens(pair: tuple[nn.Module, nn.Module], side: str) -> None:
    mask = padding(side.partition(" ")[0])
    inputs = {"input_ids": tokens(4), "attention_mask": mask}
    if side == "left with positions":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    (want, want_gradients), (got, got_gradients) = (loss_gradients(model, mask, **inputs) for model in pair)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()
    for mine, other in zip(got_gradients, want_gradients, strict=True):
        assert (mine - other).abs().max() < 1e-10 * max(1.0, float(other.abs().max()))


def test_without_a_mask_rows_are_whole_sequences(pair: tuple[nn.Module, nn.Module]) -> None:
    ids = tokens(3)
    want, got = (model(ids, use_cache=False).logits for model in pair)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()


PACKED = (7, 1, 15)


def packed_and_alone(models: tuple[nn.Module, nn.Module], **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    theirs, keel = models
    ids = tokens(1, sum(PACKED))
    positions = torch.cat([torch.arange(length) for length in PACKED])[None]
    packed = keel(ids, use_cache=False, position_ids=positions, **kwargs).logits[0]
    return packed, torch.cat([theirs(part, use_cache=False).logits[0] for part in ids.split(PACKED, 1)])


def cu_seq_lens() -> dict[str, Any]:
    return {"cu_seq_lens_q": torch.tensor([0, *PACKED]).cumsum(0).to(torch.int32), "max_length_q": max(PACKED)}


@pytest.mark.parametrize("told_by", ["cu_seq_lens", "positions"])
def test_packed_sequences_equal_the_sequences_alone(pair: tuple[nn.Module, nn.Module], told_by: str) -> None:
    packed, alone = packed_and_alone(pair, **(cu_seq_lens() if told_by == "cu_seq_lens" else {}))
    assert (packed - alone).abs().max() < 1e-12 * alone.abs().max()


def test_packed_sequences_with_no_mask_per_layer_type(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    packed, alone = packed_and_alone(gpt_oss, **cu_seq_lens(), attention_mask=dict.fromkeys(KINDS))
    assert (packed - alone).abs().max() < 1e-12 * alone.abs().max()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_generate_with_a_cache_equals_transformers(pair: tuple[nn.Module, nn.Module], cache: str, side: str) -> None:
    mask = padding(side)
    results = [
        model.generate(
            tokens(4),
            attention_mask=mask,
            max_new_tokens=9,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for model in pair
    ]
    want, got = (torch.stack(result.logits) for result in results)
    assert torch.equal(results[1].sequences, results[0].sequences)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()  # generate keeps logits in float32


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_chunks_over_a_cache_equal_one_pass(pair: tuple[nn.Module, nn.Module], kind: type) -> None:
    theirs, keel = pair
    ids = tokens(2)
    want = theirs(ids, use_cache=False).logits
    kwargs = {"max_cache_len": 40} if kind is StaticCache else {}
    cache = kind(config=keel.config, **kwargs)
    got = torch.cat(
        [keel(part, past_key_values=cache, use_cache=True).logits for part in ids.split((9, 1, 8, 5), 1)], 1
    )
    assert (got - want).abs().max() < 1e-12 * want.abs().max()


def test_same_bits_with_and_without_gradient_and_with_checkpointing(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    keel = copy.deepcopy(gpt_oss[1]).float()
    inputs = {"input_ids": tokens(4), "attention_mask": padding("left"), "use_cache": False}
    with torch.no_grad():
        first = keel(**inputs).logits
    keel.train()
    keel.gradient_checkpointing_enable({"use_reentrant": False})
    second = keel(**inputs).logits
    second.sum().backward()
    assert torch.equal(first, second)
    assert torch.isfinite(keel.model.layers[0].self_attn.sinks.grad).all()


@pytest.mark.parametrize("told_by", ["left", "cu_seq_lens"])
def test_a_compiled_model_gives_the_same_values_and_gradients(
    gpt_oss: tuple[nn.Module, nn.Module], told_by: str
) -> None:
    """Attention stays outside the graphs; what is traced around it must not change what it is told."""
    theirs, keel = gpt_oss
    mask = padding("left")
    inputs = {"input_ids": tokens(4), "attention_mask": mask}
    if told_by == "cu_seq_lens":
        positions = torch.cat([torch.arange(length) for length in PACKED])[None]
        inputs, mask = {"input_ids": tokens(1), "position_ids": positions, **cu_seq_lens()}, torch.ones(1, LENGTH)
    torch._dynamo.reset()
    compiled = torch.compile(keel, backend="eager")
    got, got_gradients = loss_gradients(compiled, mask, **inputs)
    want, want_gradients = loss_gradients(keel if told_by == "cu_seq_lens" else theirs, mask, **inputs)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()
    for mine, other in zip(got_gradients, want_gradients, strict=True):
        assert (mine - other).abs().max() < 1e-10 * max(1.0, float(other.abs().max()))


def test_an_engines_cache_is_handed_every_layers_call(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    class Slots:
        def __init__(self) -> None:
            self.calls: list[tuple[int, int | None, tuple[int, ...]]] = []

        def attend(self, layer_idx, query, key, value, *, sinks, window, scaling):
            self.calls.append((layer_idx, window, tuple(key.shape)))
            assert torch.equal(sinks, gpt_oss[1].model.layers[layer_idx].self_attn.sinks)
            assert scaling == 10**-0.5
            return query.transpose(1, 2)

    slots = Slots()
    gpt_oss[1](tokens(1, 7), use_cache=False, attention_mask=dict.fromkeys(KINDS), keel_cache=slots)
    assert slots.calls == [(0, None, (1, 2, 7, 10)), (1, 6, (1, 2, 7, 10)), (2, None, (1, 2, 7, 10))]


def causal_4d() -> torch.Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]


def holes() -> torch.Tensor:
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, 5:8] = 0
    return mask


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ready-made mask": ({"attention_mask": causal_4d()}, r"ready-made mask of shape \[1, 1, 23, 23\]"),
    "holes": ({"attention_mask": holes()}, "row 0 of attention_mask has padding between"),
    "attention weights": ({"output_attentions": True}, "output_attentions"),
    "bidirectional": ({"is_causal": False}, "causal"),
    "soft cap": ({"softcap": 30.0}, "softcap=30.0"),
    "two tellings": (
        {"attention_mask": padding("left")[:1], "cu_seq_lens_q": torch.tensor([0, LENGTH])},
        "both say where sequences lie",
    ),
    "other keys": ({"cu_seq_lens_q": torch.tensor([0, LENGTH]), "cu_seq_lens_k": torch.tensor([0, 9])}, "must equal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_raises(gpt_oss: tuple[nn.Module, nn.Module], name: str) -> None:
    kwargs, message = REFUSED[name]
    with pytest.raises(AttentionMaskError, match=message):
        gpt_oss[1](tokens(1), use_cache=False, **kwargs)


def test_dropout_raises_in_training_only(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    keel = copy.deepcopy(gpt_oss[1])
    for layer in keel.model.layers:
        layer.self_attn.attention_dropout = 0.1
    keel(tokens(1), use_cache=False)
    with pytest.raises(AttentionMaskError, match=r"no dropout, got 0\.1"):
        keel.train()(tokens(1), use_cache=False)


def test_packed_needs_one_row(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(AttentionMaskError, match="one row without a cache; got 2 rows"):
        gpt_oss[1](tokens(2), use_cache=False, cu_seq_lens_q=torch.tensor([0, LENGTH]))


def test_masks_of_custom_functions_and_other_shapes_raise(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

    made = gpt_oss[1].config
    common: dict[str, Any] = {"config": made, "inputs_embeds": torch.zeros(1, LENGTH, 4), "attention_mask": None}
    with pytest.raises(AttentionMaskError, match="custom mask function"):
        create_causal_mask(past_key_values=None, and_mask_function=lambda b, h, q, k: k > 3, **common)
    query, key = torch.zeros(1, 6, LENGTH, 10), torch.zeros(1, 2, LENGTH, 10)
    layer = gpt_oss[1].model.layers[0].self_attn
    blocks = torch.full((1, LENGTH), -1)
    blocks[0, 4:9] = 0
    for mask in (
        create_bidirectional_mask(**common),
        create_causal_mask(past_key_values=None, block_sequence_ids=blocks, **common),
    ):
        with pytest.raises(AttentionMaskError, match="causal, over whole sequences"):
            attention.keel_attention_forward(layer, query, key, key, mask, s_aux=layer.sinks)


def test_a_layer_whose_window_is_not_its_masks_raises(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    keel = copy.deepcopy(gpt_oss[1])
    keel.model.layers[1].self_attn.sliding_window = 7
    with pytest.raises(AttentionMaskError, match="window is 7, its mask's is 6"):
        keel(tokens(1), use_cache=False)


def test_sinks_that_are_not_passed_raise(gpt_oss: tuple[nn.Module, nn.Module]) -> None:
    layer = gpt_oss[1].model.layers[0].self_attn
    query, key = torch.zeros(1, 6, 4, 10), torch.zeros(1, 2, 4, 10)
    with pytest.raises(AttentionMaskError, match="did not pass them"):
        attention.keel_attention_forward(layer, query, key, key, None)
