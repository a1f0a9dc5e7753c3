"""AdamW over masters against torch's own, schedules against torch's own, and what decays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from keel.config import OptimConfig
from keel.dist.ranks import Ranks
from keel.learner.optim import MasterAdamW, decays, learning_rate


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "a.weight": (5, 7),
        "a.bias": (7,),
        "experts.up_bias": (3, 4),
        "norm.weight": (6,),
        "experts.up": (3, 4, 2),
    }
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in parameters().items()}


def run(optimizer, own, steps, lr=0.1, scale=1.0):
    for step in range(steps):
        optimizer.zero()
        for name, gradient in gradients(step).items():
            own[name].grad = gradient.to(own[name].dtype)
        optimizer.accumulate()
        optimizer.finish()
        optimizer.step(lr, scale)


def test_float32_is_torchs_adamw_with_decay_on_matrices_only():
    options = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    own, plain = parameters(), parameters()
    optimizer = MasterAdamW(own, Ranks())
    optimizer.reset(options)
    run(optimizer, own, 5)
    matrices = [plain["a.weight"], plain["experts.up"]]
    others = [plain["a.bias"], plain["experts.up_bias"], plain["norm.weight"]]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, foreach=False, fused=False)
    for step in range(5):
        for name, gradient in gradients(step).items():
            plain[name].grad = gradient
        torchs.step()
    for name, parameter in plain.items():
        torch.testing.assert_close(own[name].detach(), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_bfloat16_follows_its_float32_masters():
    """Steps far below bfloat16's resolution add up in the masters until the weights move."""
    own = {"w.weight": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))}
    optimizer = MasterAdamW(own, Ranks())
    optimizer.reset(OptimConfig(lr=1e-4))
    moved_at = None
    for step in range(30):
        optimizer.zero()
        own["w.weight"].grad = torch.ones(4, 4, dtype=torch.bfloat16)
        optimizer.accumulate()
        optimizer.finish()
        optimizer.step(1e-4, 1.0)
        if moved_at is None and bool((own["w.weight"] != 1).all()):
            moved_at = step
    assert moved_at is not None
    assert moved_at > 10
    master = optimizer.masters["w.weight"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((4, 4), 1 - 30e-4), rtol=1e-5, atol=0)
    assert torch.equal(own["w.weight"].detach(), master.bfloat16())


def test_norm_scale_and_unused_parameters():
    own = parameters()
    optimizer = MasterAdamW(own, Ranks())
    optimizer.reset(OptimConfig())
    optimizer.zero()
    own["a.weight"].grad = torch.full((5, 7), 2.0)
    own["a.bias"].grad = torch.full((7,), 1.0)
    optimizer.accumulate()
    assert optimizer.finish() == pytest.approx((35 * 4 + 7) ** 0.5, rel=1e-7)
    optimizer.step(1e-3, 0.5)
    moments = optimizer.moments()
    torch.testing.assert_close(moments["exp_avg"]["a.weight"], torch.full((5, 7), 0.1 * 2.0 * 0.5))
    assert not moments["exp_avg"]["norm.weight"].any()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", None),
    ],
)
def test_schedules(schedule, expected):
    options = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=3, final_lr_fraction=0.2)
    found = [learning_rate(options, position, 8) for position in range(8)]
    if expected is None:
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=0.2)
        expected = [0.25, 0.5, 0.75]
        for _ in range(5):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            torchs.step()
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_stage_of_one_step_has_a_learning_rate():
    for schedule in ("constant", "linear", "cosine"):
        assert learning_rate(OptimConfig(lr=1.0, schedule=schedule), 0, 1) == 1.0


def test_what_decays():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert decays("layers.0.q_proj.weight", matrix)
    assert decays("layers.0.mlp.experts.gate_up_proj", torch.zeros(2, 2, 2))
    assert not decays("layers.0.mlp.experts.gate_up_proj_bias", matrix)
    assert not decays("layers.0.self_attn.sinks", vector)
