"""The one-step norm against its float64 twin and torch's own."""

from __future__ import annotations

import pytest
import torch

from keel.ops.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-5


def make(dtype=torch.float64, shape=(3, 5, 7)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight


def test_values_and_gradients_match_the_float64_twin():
    grad = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (rms_norm, rms_norm_reference):
        x, weight = make()
        out = run(x, weight, EPS)
        out.backward(grad)
        results.append((out.detach(), x.grad, weight.grad))
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-13)


def test_gradients_match_finite_differences():
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), make())


def test_float32_matches_torch():
    x, weight = make(torch.float32, (40, 128))
    torch.testing.assert_close(rms_norm(x, weight, EPS), torch.nn.functional.rms_norm(x, (128,), weight, EPS))


def test_a_row_of_zeros_stays_finite():
    x = torch.zeros(2, 7, requires_grad=True)
    rms_norm(x, torch.ones(7), EPS).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_a_rows_bits_depend_on_that_row_alone(rows):
    x, weight = make(torch.float32, (64, 128))
    assert torch.equal(rms_norm(x[:rows], weight, EPS), rms_norm(x, weight, EPS)[:rows])


def test_other_types_are_refused():
    x, weight = make(torch.bfloat16)
    with pytest.raises(ValueError, match="needs float32 or float64"):
        rms_norm(x, weight, EPS)
