"""Fitted modules give what the modules they stand for give."""

from __future__ import annotations

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRMSNorm

from keel.models import attention as keel_attention
from keel.models.fitted import fit_modules
from keel.models.tiny import build_tiny_model, tiny_config


def make_model(preset="gpt_oss"):
    keel_attention.register()
    model = build_tiny_model(preset, vocab_size=300, seed=2)
    model.set_attn_implementation("keel")
    return model


def run_packed(model, lengths=(12, 31, 7)):
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return model(
        input_ids=torch.randint(0, 300, (1, total), generator=torch.Generator().manual_seed(0)),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask={"full_attention": None, "sliding_attention": None},
        use_cache=False,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(lengths),
    ).logits


def test_float32_values_are_those_of_the_modules_replaced():
    """Float64 is held to plain transformers in tests/exact."""
    plain, fitted = make_model(), make_model()
    fit_modules(fitted)
    with torch.no_grad():
        torch.testing.assert_close(run_packed(fitted), run_packed(plain), rtol=0, atol=1e-5)


def test_in_bfloat16_the_fitted_modules_are_as_near_the_truth_as_those_they_replace():
    errors = []
    for fit in (False, True):
        model = make_model().to(torch.bfloat16)
        truth = make_model().to(torch.bfloat16).float()
        if fit:
            fit_modules(model)
        with torch.no_grad():
            difference = run_packed(model, (60, 60, 60)).float() - run_packed(truth, (60, 60, 60))
        errors.append(difference.abs().median())  # not the mean: a route that flips moves a whole token
    assert errors[1] < 1.2 * errors[0]


def test_gradients_are_those_of_the_modules_replaced_in_float32():
    gradients = []
    for fit in (False, True):
        model = make_model()
        if fit:
            fit_modules(model)
        run_packed(model).square().mean().backward()
        gradients.append(dict(model.named_parameters()))
    plain, fitted = gradients
    assert plain.keys() == fitted.keys()
    for name, parameter in plain.items():
        difference = (parameter.grad - fitted[name].grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, name


def test_calls_the_fast_path_does_not_cover_run_the_original(tmp_path):
    """Padded batches and generation with a cache, which `transformers` itself may ask of the model."""
    plain, fitted = make_model(), make_model()
    fit_modules(fitted)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        torch.testing.assert_close(
            fitted(input_ids=ids, attention_mask=mask).logits[mask.bool()],
            plain(input_ids=ids, attention_mask=mask).logits[mask.bool()],
            rtol=0,
            atol=1e-5,
        )
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(fitted.generate(ids[1:], **options), plain.generate(ids[1:], **options))


def test_classes_and_names_stay_what_they_were():
    model = make_model()
    names = set(model.state_dict())
    fit_modules(model)
    kinds = {type(module) for module in model.modules()}
    fit_modules(model)
    assert {type(module) for module in model.modules()} == kinds
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    assert isinstance(attention, GptOssAttention)
    assert type(attention) is not GptOssAttention
    assert isinstance(norm, GptOssRMSNorm)
    assert set(model.state_dict()) == names


def test_attention_without_biases():
    keel_attention.register()
    config = tiny_config("gpt_oss", vocab_size=300, attention_bias=False)
    from transformers import GptOssForCausalLM

    with torch.random.fork_rng():
        model = GptOssForCausalLM._from_config(config, attn_implementation="keel").eval()
    with torch.no_grad():
        plain = run_packed(model)
        fit_modules(model)
        torch.testing.assert_close(run_packed(model), plain, rtol=0, atol=1e-5)
