"""AdamW over float32 masters, its learning rate, and the gradient between backward and step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from keel.config import OptimConfig
from keel.dist.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(optim: OptimConfig, position: int, num_steps: int) -> float:
    """Learning rate of training step `position` (from 0) of a stage of `num_steps`.

    Linear warm-up reaches `lr` at step `warmup_steps`; a decaying schedule then ends at `final_lr_fraction` of it in
    the stage's last step. A function of the position alone, so that there is no state to lose.
    """
    if position < optim.warmup_steps:
        return optim.lr * (position + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    decay_steps = max(1, num_steps - 1 - optim.warmup_steps)
    done = min(1.0, (position - optim.warmup_steps) / decay_steps)
    left = 1.0 - done if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optim.lr * (optim.final_lr_fraction + (1.0 - optim.final_lr_fraction) * left)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Weight decay is for matrices: not for norms, sinks and biases (those of experts are [E, H], still biases)."""
    return parameter.dim() >= 2 and "bias" not in name.rsplit(".", 1)[-1]


class MasterAdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on float32 masters of a model's parameters.

    A float32 parameter is its own master; a bfloat16 one is the rounded copy of a float32 master, and its gradients
    are added up in float32 over micro-batches. With sharded parameters everything here is the local shard.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        self._parameters = dict(parameters)
        self._local = {name: ranks.local(parameter.detach()) for name, parameter in self._parameters.items()}
        self.masters = {name: local.float() for name, local in self._local.items()}  # float(): itself if it is
        self._rounded = [name for name, local in self._local.items() if local.dtype != torch.float32]
        self._gradients: dict[str, torch.Tensor] = {}
        self.num_steps = 0
        self._adamw: torch.optim.AdamW | None = None

    def reset(self, optim: OptimConfig) -> None:
        """Forget the moments and start with the options `optim`."""
        self.num_steps = 0
        self._adamw = _adamw(self.masters, optim)

    def configure(self, optim: OptimConfig) -> None:
        """Take over the options `optim`, keeping the moments."""
        moments, num_steps = self.moments(), self.num_steps
        self.reset(optim)
        if moments:
            self.restore(moments, num_steps)

    def zero(self) -> None:
        """Drop any gradient."""
        self._gradients = {}
        for parameter in self._parameters.values():
            parameter.grad = None

    def accumulate(self) -> None:
        """After a micro-batch's backward: move gradients of rounded parameters into float32 sums."""
        for name in self._rounded:
            gradient = self._take(name)
            if gradient is None:
                continue
            if name in self._gradients:
                self._gradients[name].add_(gradient)
            else:
                self._gradients[name] = gradient.float()

    def finish(self) -> float:
        """After the last micro-batch: every master's gradient is in place. Returns their global norm (float64).

        A parameter that nothing used has gradient zero, so that its moments decay like everybody's.
        """
        for name, master in self.masters.items():
            gradient = self._gradients.get(name)
            if gradient is None:
                gradient = self._take(name)
            self._gradients[name] = torch.zeros_like(master) if gradient is None else gradient
        norms = torch._foreach_norm(list(self._gradients.values()))
        total = torch.stack([norm.double() for norm in norms]).square().sum()
        return math.sqrt(float(self._ranks.sum(total)))

    @property
    def gradients(self) -> Mapping[str, torch.Tensor]:
        """The gradient that `finish` ended, by name; empty once it is used up."""
        return self._gradients

    def _take(self, name: str) -> torch.Tensor | None:
        parameter = self._parameters[name]
        gradient, parameter.grad = parameter.grad, None
        return None if gradient is None else self._ranks.local(gradient)

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """One AdamW step with the finished gradient times `scale`; parameters follow their masters."""
        assert self._adamw is not None
        if scale != 1.0:
            torch._foreach_mul_(list(self._gradients.values()), scale)
        for name, master in self.masters.items():
            master.grad = self._gradients[name]
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.num_steps += 1
        for master in self.masters.values():
            master.grad = None
        self.zero()
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Write the masters into the parameters that are rounded copies of them."""
        if self._rounded:
            torch._foreach_copy_(
                [self._local[name] for name in self._rounded], [self.masters[name] for name in self._rounded]
            )

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """`{"exp_avg": {name: [local shape]}, "exp_avg_sq": ...}`; empty before the first step."""
        if self._adamw is None or self.num_steps == 0:
            return {}
        state = self._adamw.state
        return {kind: {name: state[master][kind] for name, master in self.masters.items()} for kind in MOMENTS}

    def restore(self, moments: Mapping[str, Mapping[str, torch.Tensor]], num_steps: int) -> None:
        """Continue with `moments` (as `moments()` gave them) of `num_steps` steps, after `reset`."""
        assert self._adamw is not None
        self.num_steps = num_steps
        for name, master in self.masters.items():
            self._adamw.state[master] = {
                "step": torch.tensor(float(num_steps), dtype=torch.float32, device=master.device),
                **{kind: moments[kind][name].to(master.device, copy=True) for kind in MOMENTS},
            }


def _adamw(masters: Mapping[str, torch.Tensor], optim: OptimConfig) -> torch.optim.AdamW:
    matrices = [master for name, master in masters.items() if decays(name, master)]
    others = [master for name, master in masters.items() if not decays(name, master)]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
