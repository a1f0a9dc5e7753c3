"""Declared routers: the modules that choose experts, with a place to record the choice and a place to replay it.

They take the place of the routers `transformers` builds, with the same parameters under the same names (checkpoints
stay ordinary) and the same arithmetic. Recording and replay are switched on by context, so a layer's signature does
not change and gradient checkpointing does not get in the way:

    with record_routes(RouteRecorder(num_moe_layers)) as recorder:
        policy.trunk(...)
    recorder.routes()          # [T, moe layers, k] int32

    with replay_routes(routes):
        policy(micro_batch)    # these experts, weighted by the router's present logits

While it replays, a router still says what it would have chosen: of hidden states that the replayed experts of earlier
layers made, so a first difference is not counted again for all that follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from keel.ops.low_rank import LowRank, low_rank
from keel.ops.matmul import linear
from keel.ops.numerics import exact_numerics, is_exact


class RouteRecorder:
    """Keeps each router's choice of one forward pass; recording a layer again overwrites it with the same values."""

    def __init__(self, num_moe_layers: int, *, with_margins: bool = False, with_logits: bool = False) -> None:
        self.with_margins = with_margins
        self.with_logits = with_logits
        self._chosen: list[torch.Tensor | None] = [None] * num_moe_layers
        self._own: list[torch.Tensor | None] = [None] * num_moe_layers
        self._margins: list[torch.Tensor | None] = [None] * num_moe_layers
        self._logits: list[torch.Tensor | None] = [None] * num_moe_layers

    def record(self, moe_layer: int, chosen: torch.Tensor, own: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep `chosen [T, k]` of MoE layer number `moe_layer`, its `own` choice `[T, k]` (another where one is
        replayed), and what is wanted of its `logits [T, E]`."""
        self._chosen[moe_layer] = chosen.detach()
        self._own[moe_layer] = own.detach()
        if self.with_margins:
            self._margins[moe_layer] = route_margin(logits.detach(), chosen.shape[-1])
        if self.with_logits:
            self._logits[moe_layer] = logits

    def routes(self) -> torch.Tensor:
        """The experts that ran: `[T, moe layers, k]` int32. Raises RuntimeError if a layer was never run."""
        return torch.stack(_complete(self._chosen), dim=1).to(torch.int32)

    def own_routes(self) -> torch.Tensor:
        """The experts each router would have run, likewise; the same where nothing was replayed."""
        return torch.stack(_complete(self._own), dim=1).to(torch.int32)

    def logits(self) -> torch.Tensor:
        """`[T, moe layers, E]` router logits, with their gradient. Raises RuntimeError if they were not recorded."""
        return torch.stack(_complete(self._logits), dim=1)

    def margins(self) -> torch.Tensor:
        """`[T, moe layers]` float32: gap in router logits between the last expert chosen and the first left out.

        Raises RuntimeError if margins were not recorded.
        """
        return torch.stack(_complete(self._margins), dim=1).float()


def _complete(layers: list[torch.Tensor | None]) -> list[torch.Tensor]:
    missing = [index for index, layer in enumerate(layers) if layer is None]
    if missing:
        raise RuntimeError(
            f"routes: MoE layers {missing} of {len(layers)} were not recorded; run the whole trunk inside it"
        )
    return [layer for layer in layers if layer is not None]


def route_margin(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Gap `[T]` between the `top_k`-th and the next of router `logits [T, E]`; infinite if every expert is chosen."""
    if top_k >= logits.shape[-1]:
        return torch.full(logits.shape[:-1], torch.inf, dtype=torch.float32, device=logits.device)
    highest = torch.topk(logits.float(), top_k + 1, dim=-1).values
    return highest[..., -2] - highest[..., -1]


_recorder: ContextVar[RouteRecorder | None] = ContextVar("keel_route_recorder", default=None)
_replay: ContextVar[torch.Tensor | None] = ContextVar("keel_route_replay", default=None)


@contextmanager
def record_routes(recorder: RouteRecorder) -> Iterator[RouteRecorder]:
    """Every declared router that runs in this context (and in no other thread) tells `recorder` its choice."""
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


@contextmanager
def replay_routes(routes: torch.Tensor) -> Iterator[None]:
    """Routers in this context choose `routes [T, moe layers, k]`; where it says -1 they choose for themselves.

    A token of which not all k experts of a layer are known is chosen for as a whole. The weights of the chosen experts
    are the router's present ones, with gradient. Raises ValueError if `routes` is
    not integer or not three-dimensional.
    """
    if routes.dim() != 3 or routes.is_floating_point():
        raise ValueError(f"replay_routes: got {routes.dtype} {tuple(routes.shape)}; needs integer [T, moe layers, k]")
    token = _replay.set(routes)
    try:
        yield
    finally:
        _replay.reset(token)


def replayed() -> torch.Tensor | None:
    """The routes that this context replays, `[T, moe layers, k]`, if it replays any."""
    return _replay.get()


def replay_of_rows(rows: torch.Tensor | None) -> AbstractContextManager[None]:
    """What is replayed, if anything, for the given rows alone; None: for all."""
    routes = _replay.get()
    return nullcontext() if routes is None or rows is None else replay_routes(routes[rows])


def replay_for_rows(num_rows: int) -> AbstractContextManager[None]:
    """What is replayed, if anything, filled up to `num_rows` rows that choose for themselves."""
    routes = _replay.get()
    if routes is None or routes.shape[0] >= num_rows:
        return nullcontext()
    return replay_routes(functional.pad(routes, (0, 0, 0, 0, 0, num_rows - routes.shape[0]), value=-1))


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's checkpoint: the recomputation replays what the forward pass replayed, as exactly.

    It runs in the backward pass, when the caller's context is long left; without this it would choose experts anew.
    """
    routes, exact = _replay.get(), is_exact()
    return nullcontext(), nullcontext() if routes is None and not exact else _again(routes, exact)


@contextmanager
def _again(routes: torch.Tensor | None, exact: bool) -> Iterator[None]:
    with (
        nullcontext() if routes is None else replay_routes(routes),
        exact_numerics() if exact else nullcontext(),
    ):
        yield


class Router(nn.Module):
    """What the declared routers share: parameters taken over from the module they replace, recording, replay."""

    def __init__(self, source: nn.Module, moe_layer: int) -> None:
        super().__init__()
        self.moe_layer = moe_layer
        self.top_k = int(source.top_k)  # type: ignore[arg-type]
        self.num_experts = int(source.num_experts)  # type: ignore[arg-type]
        self.hidden_dim = int(source.hidden_dim)  # type: ignore[arg-type]
        self.weight: nn.Parameter = source.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = getattr(source, "bias", None)
        self.in_float32 = False

    def logits(self, hidden_states: torch.Tensor, adapter: LowRank | None) -> torch.Tensor:
        """`hidden_states [T, Hd]` -> `[T, E]`, an adapter of the weight included; at least float32 if so asked."""
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if self.in_float32:
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            hidden_states, weight = hidden_states.to(wide), weight.to(wide)
            bias = None if bias is None else bias.to(wide)
            if adapter is not None:
                adapter = LowRank(adapter.down.to(wide), adapter.up.to(wide), adapter.scaling)
        logits = (linear if is_exact() else functional.linear)(hidden_states, weight, bias)
        return logits if adapter is None else logits + low_rank(hidden_states, adapter)

    def choose(self, scores: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The `top_k` highest of `scores [T, E]` as (values, indices [T, k]), replayed and recorded where asked."""
        values, own = torch.topk(scores, self.top_k, dim=-1)
        chosen = own
        replay = _replay.get()
        if replay is not None:
            forced = replay[:, self.moe_layer].to(chosen.dtype)
            if forced.shape != chosen.shape:
                raise ValueError(
                    f"replay_routes: got {tuple(forced.shape)} choices for MoE layer {self.moe_layer}, "
                    f"which routes {tuple(chosen.shape)}; replay the routes of the same tokens"
                )
            chosen = torch.where((forced >= 0).all(-1, keepdim=True), forced, own)
            values = scores.gather(-1, chosen)
        recorder = _recorder.get()
        if recorder is not None:
            recorder.record(self.moe_layer, chosen, own, logits)
        return values, chosen


class SoftmaxOfChosenRouter(Router):
    """GPT-OSS: weights are the softmax over the chosen experts' logits."""

    def forward(
        self, hidden_states: torch.Tensor, adapter: LowRank | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden_states [T, Hd]` -> (logits [T, E], weights [T, k], chosen [T, k])."""
        logits = self.logits(hidden_states, adapter)
        values, chosen = self.choose(logits, logits)
        return logits, torch.softmax(values, dim=-1).to(hidden_states.dtype), chosen


class ChosenOfSoftmaxRouter(Router):
    """Qwen3-MoE, Mixtral: weights are the chosen experts' shares of the softmax over all, made to sum to 1 if asked."""

    def __init__(self, source: nn.Module, moe_layer: int) -> None:
        super().__init__(source, moe_layer)
        self.norm_topk_prob = bool(getattr(source, "norm_topk_prob", True))

    def forward(
        self, hidden_states: torch.Tensor, adapter: LowRank | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden_states [.., Hd]` -> (logits [T, E], weights [T, k], chosen [T, k])."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = self.logits(hidden_states, adapter)
        values, chosen = self.choose(torch.softmax(logits, dim=-1, dtype=torch.float32), logits)
        if self.norm_topk_prob:
            values = values / values.sum(dim=-1, keepdim=True)
        return logits, values.to(hidden_states.dtype), chosen


class RouterOptions(Protocol):
    """The config's `model.router` section, as far as it is needed here."""

    @property
    def dtype(self) -> str: ...

    @property
    def frozen(self) -> bool: ...


def set_up_routers(routers: tuple[Router, ...], options: RouterOptions, num_moe_layers: int) -> None:
    """Give `routers` their type of product, and take away what may not be trained.

    Raises ValueError if something is asked of routers that are not declared.
    """
    asked = options.frozen or options.dtype != "model"
    if asked and len(routers) != num_moe_layers:
        raise ValueError(
            f"model.router: {num_moe_layers} layers choose experts, of which {len(routers)} by a router that Keel "
            f"knows ({', '.join(DECLARED)}); leave model.router.dtype and model.router.frozen as they are"
        )
    for router in routers:
        router.in_float32 = options.dtype == "float32"
        if options.frozen:
            router.requires_grad_(False)


DECLARED: dict[str, type[Router]] = {
    "GptOssTopKRouter": SoftmaxOfChosenRouter,
    "Qwen3MoeTopKRouter": ChosenOfSoftmaxRouter,
}


def replace_routers(model: nn.Module) -> tuple[Router, ...]:
    """Put a declared router in the place of each one known, in layer order; returns them.

    A model without experts has none; so has a family not listed here, whose routes then cannot be captured.
    """
    routers: list[Router] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            declared = DECLARED.get(type(child).__name__)
            if declared is not None:
                router = declared(child, len(routers)).train(child.training)
                setattr(parent, name, router)
                routers.append(router)
    return tuple(routers)
