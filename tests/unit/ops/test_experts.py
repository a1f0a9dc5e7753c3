"""Sorted experts against their float64 twin and against `transformers`; bits that must not move."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keel.ops import experts_tiles
from keel.ops.experts import ExpertsLayout, ExpertsWeights, experts_forward, experts_reference
from keel.ops.experts_gate import ExpertsGate, reaches_limit
from keel.ops.experts_pieces import NARROW, PIECE_ROWS
from keel.ops.experts_tiles import TILE_ROWS, experts_row_invariant

HIDDEN, INNER, EXPERTS, TOP_K = 12, 10, 5, 2
GPT_OSS = ExpertsLayout(transposed=True, interleaved=True, alpha=1.702, offset=1.0, limit=0.9)
QWEN = ExpertsLayout()
LAYOUTS = pytest.mark.parametrize("layout", [GPT_OSS, QWEN], ids=["gpt_oss", "qwen3_moe"])


def make_weights(layout: ExpertsLayout, *, dtype=torch.float64, num_experts=EXPERTS, hidden=HIDDEN, inner=INNER):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(0.6).to(dtype).requires_grad_()

    if layout.transposed:
        first, second = draw(num_experts, hidden, 2 * inner), draw(num_experts, inner, hidden)
    else:
        first, second = draw(num_experts, 2 * inner, hidden), draw(num_experts, hidden, inner)
    if not layout.interleaved:
        return ExpertsWeights(first, None, second, None)
    return ExpertsWeights(first, draw(num_experts, 2 * inner), second, draw(num_experts, hidden))


def make_inputs(chosen: torch.Tensor, *, dtype=torch.float64, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(chosen.shape[0], hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    shares = torch.rand(chosen.shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, shares


def routing(kind: str, num_tokens: int = 23, num_experts: int = EXPERTS, top_k: int = TOP_K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if kind == "idle expert":  # one expert without a token, and the one after it must not shift
        scores[:, 2] = -1.0
    if kind == "all on one pair":
        scores[:] = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3])
    if kind == "one token":
        scores = scores[:1]
    return torch.topk(scores, top_k, dim=-1).indices


ROUTINGS = pytest.mark.parametrize("kind", ["ragged", "idle expert", "all on one pair", "one token"])


@LAYOUTS
@ROUTINGS
def test_values_and_gradients_match_the_float64_twin(layout, kind):
    chosen = routing(kind)
    grad = torch.randn(chosen.shape[0], HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (experts_forward, experts_reference):
        experts = make_weights(layout)
        x, shares = make_inputs(chosen)
        out = run(x, chosen, shares, experts, layout)
        out.backward(grad)
        leaves = [x, shares, experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias]
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-12)


def compared_with_the_twin(layout, chosen, *, dtype=torch.float64, hidden=HIDDEN, inner=INNER):
    """Relative distances of output and gradients from the twin's."""
    if layout.limit is not None and dtype == torch.bfloat16:
        layout = replace(layout, limit=1e9)  # a gradient jumps at the limit, which rounding crosses
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(chosen.shape[0], hidden, dtype=torch.float64, generator=generator).to(dtype)
    results = []
    for run in (experts_forward, experts_reference):
        experts = make_weights(layout, dtype=dtype, hidden=hidden, inner=inner)
        x, shares = make_inputs(chosen, dtype=dtype, hidden=hidden)
        out = run(x, chosen, shares, experts, layout)
        leaves = [x, shares, experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias]
        grads = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad.to(out.dtype))
        results.append([part.detach().double() for part in (out, *grads)])
    return [float((ours - twin).norm() / twin.norm()) for ours, twin in zip(*results, strict=True)]


@LAYOUTS
@pytest.mark.parametrize("num_tokens", [PIECE_ROWS, PIECE_ROWS + 1, 2 * PIECE_ROWS + 77])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_an_expert_with_more_rows_than_a_piece(layout, num_tokens, dtype, bound):
    assert max(compared_with_the_twin(layout, routing("all on one pair", num_tokens), dtype=dtype)) < bound


@LAYOUTS
@pytest.mark.parametrize("num_tokens", [40, 1200], ids=["few rows", "more rows than columns"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_wide_experts(layout, num_tokens, dtype, bound):
    """Weights above the size up to which an expert's rows are worked on in pieces."""
    sizes = {"hidden": 376, "inner": 368}
    assert sizes["hidden"] * 2 * sizes["inner"] > NARROW
    assert max(compared_with_the_twin(layout, routing("ragged", num_tokens), dtype=dtype, **sizes)) < bound


class LargestMade(TorchDispatchMode):
    """The most numbers that any operation's result has."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made._is_view():
            self.largest = max(self.largest, made.numel())
        return made


@LAYOUTS
@pytest.mark.parametrize("kind", ["ragged", "idle expert", "all on one pair"])
def test_memory_is_bounded_whatever_the_routing(layout, kind):
    """No mask over experts, no weights gathered for each token: nothing exceeds the pairs' rows or the weights."""
    num_tokens = 600
    chosen, experts = routing(kind, num_tokens), make_weights(layout, dtype=torch.float32)
    x, shares = make_inputs(chosen, dtype=torch.float32)
    saved = []
    with LargestMade() as made:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            out = experts_forward(x, chosen, shares, experts, layout)
        out.sum().backward()
    rows = num_tokens * TOP_K * 9 // 8 + 16 * EXPERTS  # filled up
    inputs = x.numel() + shares.numel() + experts.gate_up.numel() + experts.down.numel()
    biases = EXPERTS * (2 * INNER + HIDDEN)
    assert made.largest <= rows * max(2 * INNER, HIDDEN)
    assert sum(saved) <= rows * 2 * INNER + inputs + biases


IN_A_PROCESS = """
import hashlib, sys, torch
torch.set_num_threads(2)
sys.path.insert(0, sys.argv[1])
from test_experts import GPT_OSS, make_inputs, make_weights, routing
from keel.ops.experts import experts_forward
chosen = routing("ragged", 3000)
experts = make_weights(GPT_OSS, dtype=torch.float32, hidden=96, inner=80)
x, shares = make_inputs(chosen, dtype=torch.float32, hidden=96)
out = experts_forward(x, chosen, shares, experts, GPT_OSS)
out.square().sum().backward()
made = (out, x.grad, shares.grad, experts.gate_up.grad, experts.gate_up_bias.grad, experts.down.grad)
print(hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in made)).hexdigest())
"""


def test_two_processes_make_the_same_bits():
    command = [sys.executable, "-c", IN_A_PROCESS, str(Path(__file__).parent)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].strip()) == 64


@LAYOUTS
def test_gradients_match_finite_differences(layout):
    chosen = routing("ragged", 4)
    experts = make_weights(layout, hidden=4, inner=3)
    x, shares = make_inputs(chosen, hidden=4)
    leaves = [
        t for t in (x, shares, experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias) if t is not None
    ]

    def run(*tensors):
        first, first_bias, second, second_bias = (
            tensors[2:] if len(tensors) == 6 else (tensors[2], None, tensors[3], None)
        )
        return experts_forward(
            tensors[0], chosen, tensors[1], ExpertsWeights(first, first_bias, second, second_bias), layout
        )

    assert torch.autograd.gradcheck(run, leaves)


def test_the_clamp_is_reached_in_these_tests():
    experts, chosen = make_weights(GPT_OSS), routing("ragged")
    x, shares = make_inputs(chosen)
    open_limit = ExpertsLayout(transposed=True, interleaved=True, alpha=1.702, offset=1.0, limit=1e9)
    assert not torch.allclose(
        experts_forward(x, chosen, shares, experts, GPT_OSS), experts_forward(x, chosen, shares, experts, open_limit)
    )


@pytest.mark.parametrize(
    ("values", "reached"),
    [([0.5, -0.5], False), ([1.0, -1.0], False), ([1.5, 0.0], True), ([0.0, -1.5], True), ([float("nan"), 0.0], True)],
)
def test_the_clamp_is_left_out_only_where_it_changes_nothing(values, reached):
    assert reaches_limit(torch.tensor([values]), ExpertsGate(limit=1.0)) is reached
    assert not reaches_limit(torch.tensor([values]), ExpertsGate())


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_and_without_gradient_and_again(layout, dtype):
    experts, chosen = make_weights(layout, dtype=dtype), routing("ragged", 300)
    x, shares = make_inputs(chosen, dtype=dtype)
    grads = []
    for _ in range(2):
        out = experts_forward(x, chosen, shares, experts, layout)
        grads.append(torch.autograd.grad(out.float().square().sum(), [x, shares, experts.gate_up, experts.down]))
    with torch.no_grad():
        assert torch.equal(out, experts_forward(x, chosen, shares, experts, layout))
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


@LAYOUTS
def test_bfloat16_is_near_the_twin(layout):
    chosen = routing("ragged", 64)
    experts = make_weights(layout, dtype=torch.bfloat16)
    x, shares = make_inputs(chosen, dtype=torch.bfloat16)
    out = experts_forward(x, chosen, shares, experts, layout)
    twin = experts_reference(x, chosen, shares, experts, layout)
    assert out.dtype == torch.bfloat16
    assert (out.double() - twin).norm() / twin.norm() < 1e-2


@LAYOUTS
@pytest.mark.parametrize("num_experts", [EXPERTS, 20], ids=["dense tiles", "sorted tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free", [True, False], ids=["as measured", "heights matter"])
def test_row_invariant_bits_depend_on_the_token_alone(monkeypatch, layout, num_experts, dtype, free):
    if not free:
        monkeypatch.setattr(experts_tiles, "heights_are_free", lambda *_: False)
    sizes = {"hidden": 128, "inner": 112}
    experts = make_weights(layout, dtype=dtype, num_experts=num_experts, **sizes)
    num_tokens = 3 * TILE_ROWS + 5
    chosen = routing("ragged", num_tokens, num_experts)
    x, shares = make_inputs(chosen, dtype=dtype, hidden=128)
    whole = experts_row_invariant(x, chosen, shares, experts, layout)
    permutation = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(2))
    moved = experts_row_invariant(x[permutation], chosen[permutation], shares[permutation], experts, layout)
    assert torch.equal(moved, whole[permutation])
    for row in (0, 7, TILE_ROWS, num_tokens - 1):
        alone = experts_row_invariant(x[row, None], chosen[row, None], shares[row, None], experts, layout)
        assert torch.equal(alone[0], whole[row]), f"row {row} changed with its neighbours"


@LAYOUTS
@pytest.mark.parametrize("num_experts", [EXPERTS, 20], ids=["dense tiles", "sorted tiles"])
@pytest.mark.parametrize("free", [True, False], ids=["as measured", "heights matter"])
def test_row_invariant_matches_the_twin(monkeypatch, layout, num_experts, free):
    if not free:
        monkeypatch.setattr(experts_tiles, "heights_are_free", lambda *_: False)
    experts = make_weights(layout, num_experts=num_experts)
    chosen = routing("ragged", TILE_ROWS + 9, num_experts)
    x, shares = make_inputs(chosen)
    out = experts_row_invariant(x, chosen, shares, experts, layout)
    torch.testing.assert_close(out, experts_reference(x, chosen, shares, experts, layout), rtol=1e-12, atol=1e-12)
    assert not out.requires_grad


def test_matches_the_module_transformers_ships():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, swiglu_limit=0.9)
    config._experts_implementation = "eager"
    module = GptOssExperts(config).double()
    experts = make_weights(GPT_OSS)
    with torch.no_grad():
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            getattr(module, name).copy_(getattr(experts, name.replace("_proj", "")))
    chosen = routing("ragged")
    x, shares = make_inputs(chosen)
    torch.testing.assert_close(
        experts_forward(x, chosen, shares, experts, GPT_OSS), module(x, chosen, shares), rtol=1e-12, atol=1e-12
    )


def test_shapes_that_do_not_fit_are_refused():
    experts, chosen = make_weights(GPT_OSS), routing("ragged")
    x, shares = make_inputs(chosen)
    with pytest.raises(ValueError, match="do not fit together"):
        experts_forward(x, chosen, shares, experts, QWEN)
    with pytest.raises(ValueError, match=r"both need \[T, k\]"):
        experts_forward(x, chosen, shares[:, :1], experts, GPT_OSS)


@pytest.mark.parametrize("num_tokens", [1, 37, 64])
def test_few_pairs_are_sorted_as_many_are(monkeypatch, num_tokens):
    chosen = routing("ragged", num_tokens, EXPERTS)
    few = experts_tiles._tiled_segments(chosen, EXPERTS)
    monkeypatch.setattr(experts_tiles, "_FEW_PAIRS", 0)
    many = experts_tiles._tiled_segments(chosen, EXPERTS)
    assert few.bounds == many.bounds
    assert torch.equal(few.rows, many.rows)
    assert torch.equal(few.tokens, many.tokens)
