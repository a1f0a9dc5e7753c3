"""Products through either library: right at every layout, the same bits every time, few shapes."""

from __future__ import annotations

import pytest
import torch

from keel.ops import matmul
from keel.ops.matmul import FEW_ROWS, LARGE, linear, padded_rows, product, product_into


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_padded_rows_are_few_and_near():
    regular = {padded_rows(count) for count in range(1, 4097)}
    assert len(regular) < 60
    for count in range(1, 4097):
        padded = padded_rows(count)
        assert count <= padded <= max(count + 15, count * 9 / 8)
        assert padded_rows(padded) == padded
    assert padded_rows(0) == 0


ROWS = pytest.mark.parametrize("rows", [31, 32, 100, 112, 160])


@ROWS
@pytest.mark.parametrize("layout", ["plain", "transposed", "columns of something wider", "every other row"])
def test_product_is_right_for_any_strides(rows, layout):
    left, right, bias = draw(rows, 24), draw(24, 20, seed=1), draw(20, seed=2)
    expected = left @ right + bias
    narrow = left.float()
    if layout == "transposed":
        narrow = left.float().t().contiguous().t()
    elif layout == "columns of something wider":
        narrow = torch.cat((draw(rows, 3).float(), left.float()), dim=1)[:, 3:]
    elif layout == "every other row":
        narrow = left.float().repeat_interleave(2, dim=0)[::2]
    ours = product(narrow, right.float(), rows=rows, bias=bias.float())
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@ROWS
def test_a_sum_over_tokens_is_right(rows):
    """The gradient of a weight: the tokens are the inner dimension, both factors transposed or sliced."""
    grad, x = draw(rows, 30), draw(rows, 18, seed=1)
    ours = product(grad.float()[:, :20].t(), x.float(), rows=rows)
    torch.testing.assert_close(ours.double(), grad[:, :20].t() @ x, rtol=1e-5, atol=1e-4)


@ROWS
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_matches_torch_with_its_gradients(rows, with_bias):
    results = []
    for run, dtype in ((linear, torch.float32), (torch.nn.functional.linear, torch.float64)):
        x, weight = draw(rows, 24).to(dtype).requires_grad_(), draw(20, 24, seed=1).to(dtype).requires_grad_()
        bias = draw(20, seed=2).to(dtype).requires_grad_() if with_bias else None
        out = run(x, weight, bias)
        out.backward(draw(rows, 20, seed=3).to(dtype))
        results.append([out.detach(), x.grad, weight.grad, *([bias.grad] if with_bias else [])])
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), twin, rtol=1e-5, atol=1e-4)


def test_regular_float32_rows_go_to_onednn_and_nothing_else_does():
    if not matmul._HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    assert matmul._goes_to_onednn(torch.zeros(64, 8), 64)
    assert not matmul._goes_to_onednn(torch.zeros(65, 8), 65)
    assert not matmul._goes_to_onednn(torch.zeros(64, 8, dtype=torch.bfloat16), 64)
    assert not matmul._goes_to_onednn(torch.zeros(64, 8, dtype=torch.float64), 64)
    assert not matmul._goes_to_onednn(torch.zeros(64, 8, device="meta"), 64)


def test_the_same_product_has_the_same_bits():
    x, weight = draw(160, 96).float(), draw(200, 96, seed=1).float()
    assert torch.equal(linear(x, weight), linear(x.clone(), weight.clone()))
    assert torch.equal(product(x.t(), x, rows=160), product(x.clone().t(), x.clone(), rows=160))


def test_linear_takes_only_the_gradients_that_are_needed():
    x, weight = draw(64, 24).float(), draw(20, 24, seed=1).float().requires_grad_()
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


@pytest.mark.parametrize(
    ("rows", "columns"), [(32, 40), (FEW_ROWS, 40), (32, LARGE // 512 + 8), (FEW_ROWS, LARGE // 512 + 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_written_where_it_is_wanted(rows, columns, dtype):
    x, grad = draw(rows, 512, dtype=dtype), draw(rows, columns, dtype=dtype, seed=1)
    out = torch.full((512, columns), torch.nan, dtype=dtype)
    product_into(out, x.t(), grad, rows=rows)
    expected = x.double().t() @ grad.double()
    assert float((out.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 1e-2)
