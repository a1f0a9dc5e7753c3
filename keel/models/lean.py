"""A pass of an engine through a model's own parameters, without the modules' forwards around them.

A step that decodes is so short that what surrounds its products counts: the calls of modules in modules, masks nobody
needs, copies of shapes. For families whose layers are known this does the same arithmetic straight from the parameters,
to rounding what the modules do, and everything else (adapters, planted faults, replaced routers) is read where it
lies, at every pass.

Keys are kept as the modules keep them, so passes of both kinds can follow each other over one cache. A module with a
hook on it, or of a class not known, is run as it is: `problem` says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional

from keel.models.adapted import AdaptedParameter, linear_factors, plain_linear
from keel.models.experts import keel_experts_forward, row_invariant_experts
from keel.models.router import RouteRecorder, record_routes
from keel.ops.low_rank import low_rank
from keel.ops.matmul import product
from keel.ops.rms_norm import rms_norm

if TYPE_CHECKING:
    from keel.models.attention import KeelCache
    from keel.models.policy import PolicyModel

FAMILIES = ("GptOss", "Qwen3", "Qwen3Moe")
"""Beginnings of class names in `transformers`; each family's model, layer, attention and norm are known."""
_ROW_STEP = 32
"""Rows of a pass for each thread: whole vector registers, also of what a thread gets of an elementwise function."""
_PROBED_STEPS = (1, 2, 3, 5)
_MEASURED_UP_TO = 500_000_000
_row_steps: WeakKeyDictionary[PolicyModel, dict[int, int]] = WeakKeyDictionary()
_ROUTERS = ("SoftmaxOfChosenRouter", "ChosenOfSoftmaxRouter")


class LeanTrunk:
    """Embedding, layers and final norm of `policy`, for rows that each stand for themselves but in attention."""

    def __init__(self, policy: PolicyModel) -> None:
        """Raises ValueError where `problem` finds one."""
        if found := problem(policy):
            raise ValueError(f"lean passes: {found}; run the modules")
        base: Any = policy.model.base_model
        self._policy = policy
        self._base = base
        self._modules = tuple(base.modules())
        self._num_moe_layers = policy.info.num_moe_layers
        self._half = policy.info.head_dim // 2
        self._paired = type(base).__name__ == "GptOssModel"

    def is_hooked(self) -> bool:
        """Whether somebody wants to hear of a module's forward, which only the modules' own way can tell."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)

    def row_step(self) -> int:
        """A multiple of so many rows a pass may have, whatever their number, without a change in any row's bits.

        0 if that does not hold here, or was not measured: with an adapter, whose products may still be zero, on
        another device than the CPU, of a model so large that measuring takes long. Measured once for a policy and a
        number of threads.
        """
        threads = torch.get_num_threads()
        found = _row_steps.setdefault(self._policy, {})
        if threads not in found:
            found[threads] = self._measured_step(threads)
        return found[threads]

    @torch.no_grad()
    def _measured_step(self, threads: int) -> int:
        policy = self._policy
        weight = next(policy.parameters())
        if policy.adapter is not None or weight.device.type != "cpu" or _num_numbers(policy) > _MEASURED_UP_TO:
            return 0
        step = _ROW_STEP * threads
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(policy.info.vocab_size, (8 * step,), generator=generator)
        places = torch.randint(64, (8 * step,), generator=generator)

        def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            hidden, _ = self(ids[rows], places[rows], _OwnRows(), with_routes=False)
            return hidden, policy.logits(hidden)

        whole = run(slice(0, 8 * step))
        for steps in _PROBED_STEPS:
            rows = slice(11, 11 + steps * step)
            if not all(torch.equal(part, all_rows[rows]) for part, all_rows in zip(run(rows), whole, strict=True)):
                return 0
        return step

    @torch.no_grad()
    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, cache: KeelCache, *, with_routes: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`input_ids [T]`, `positions [T]` -> last hidden states `[T, Hd]`, routes `[T, moe layers, k]` or None."""
        if not with_routes:
            with row_invariant_experts():
                return self._run(input_ids, positions, cache), None
        recorder = RouteRecorder(self._num_moe_layers)
        with row_invariant_experts(), record_routes(recorder):
            hidden = self._run(input_ids, positions, cache)
        return hidden, recorder.routes()

    def _run(self, input_ids: torch.Tensor, positions: torch.Tensor, cache: KeelCache) -> torch.Tensor:
        base = self._base
        hidden = functional.embedding(input_ids, base.embed_tokens.weight)
        turns = self._turns(hidden, positions)
        for index, layer in enumerate(base.layers):
            normed = _norm(layer.input_layernorm, hidden)
            hidden = hidden + self._attention(layer.self_attn, index, normed, turns, cache)
            hidden = hidden + _feed_forward(layer.mlp, _norm(layer.post_attention_layernorm, hidden))
        return _norm(base.norm, hidden)

    def _turns(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines with the first half's sign, `[T, 1, D]`; paired `[T, 1, D / 2]`, in float32 at least."""
        angles = self._base.rotary_emb(hidden[None], positions[None])
        # Some families give the second half's angles too, which are the first's.
        cos, sin = (part[0, :, None, : self._half] for part in angles)
        if self._paired:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            return cos.to(wide), sin.to(wide)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _attention(
        self,
        attention: Any,
        index: int,
        normed: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        cache: KeelCache,
    ) -> torch.Tensor:
        shape = (normed.shape[0], -1, attention.head_dim)
        query, key, value = (
            _linear(projection, normed, fitted=self._paired).view(shape)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        query, key = _turned(torch.cat((query, key), dim=1), turns, paired=self._paired).split(
            [query.shape[1], key.shape[1]], dim=1
        )
        out = cache.attend(
            index,
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            sinks=getattr(attention, "sinks", None),
            window=attention.sliding_window,
            scaling=attention.scaling,
        )
        return _linear(attention.o_proj, out[0].flatten(1), fitted=self._paired)


class _OwnRows:
    """In the place of a cache: every row sees itself alone."""

    def attend(  # the protocol's names
        self,
        layer_idx: int,  # noqa: ARG002
        query: torch.Tensor,
        key: torch.Tensor,  # noqa: ARG002
        value: torch.Tensor,  # noqa: ARG002
        **_given: Any,
    ) -> torch.Tensor:
        return query.transpose(1, 2)


def _num_numbers(policy: PolicyModel) -> int:
    return sum(parameter.numel() for parameter in policy.parameters())


def problem(policy: PolicyModel) -> str:
    """Why `policy` cannot have lean passes; "" if it can."""
    if policy.exact:
        return "exact numerics have modules of their own"
    base: Any = policy.model.base_model
    name = type(base).__name__
    family = name.removesuffix("Model")
    if family not in FAMILIES or policy.model.config._attn_implementation != "keel":
        return f"{name} with attention {policy.model.config._attn_implementation!r} is not among those known"
    for layer in base.layers:
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        names = (type(layer).__name__, type(attention).__name__, type(layer.input_layernorm).__name__)
        if names != (f"{family}DecoderLayer", f"{family}Attention", f"{family}RMSNorm"):
            return f"layers of {', '.join(names)} are not known"
        if any(plain_linear(each) is None for each in projections):
            return "a projection is not an ordinary linear layer"
        if strange := _feed_forward_problem(layer.mlp):
            return strange
    return ""


def _feed_forward_problem(mlp: Any) -> str:
    if hasattr(mlp, "experts"):
        router = _router_of(mlp)
        while isinstance(router, AdaptedParameter):
            router = router.base_layer
        known = type(router).__name__ in _ROUTERS
        return "" if known else f"a router of class {type(router).__name__} is not known"
    parts = tuple(getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if any(part is None or plain_linear(part) is None for part in parts) or not hasattr(mlp, "act_fn"):
        return f"a feed-forward layer of class {type(mlp).__name__} is not known"
    return ""


def _router_of(mlp: Any) -> Any:
    return mlp.router if hasattr(mlp, "router") else mlp.gate


def _feed_forward(mlp: Any, normed: torch.Tensor) -> torch.Tensor:
    """`[T, Hd]` -> `[T, Hd]`: experts, or a gated layer."""
    if not hasattr(mlp, "experts"):
        gate: torch.Tensor = mlp.act_fn(_linear(mlp.gate_proj, normed))
        return _linear(mlp.down_proj, gate * _linear(mlp.up_proj, normed))
    _, weights, chosen = _router_of(mlp)(normed)
    experts: Any = mlp.experts
    if not isinstance(experts, AdaptedParameter):
        return keel_experts_forward(experts, normed, chosen, weights)
    adapted: torch.Tensor = mlp.experts(normed, chosen, weights)
    return adapted


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The family's own norm; in float32, where all families do the same, without the module around it."""
    if x.dtype == torch.float32 and norm.weight.dtype == torch.float32:
        return rms_norm(x, norm.weight, norm.variance_epsilon)
    normed: torch.Tensor = norm(x)
    return normed


def _linear(module: nn.Module, x: torch.Tensor, *, fitted: bool = False) -> torch.Tensor:
    """A linear layer `x [T, in]` -> `[T, out]`, its adapter included if it has one and that is on.

    By the library that the learner's pass goes to, `keel.ops.matmul` where its module is `fitted`: with the same
    roundings on both sides little is left of the gap between them.
    """
    plain, factors = plain_linear(module), linear_factors(module)
    assert plain is not None
    if fitted:
        out = product(x, plain.weight.t(), rows=x.shape[0], bias=plain.bias)
    else:
        out = functional.linear(x, plain.weight, plain.bias)
    return out if factors is None else out + low_rank(x, factors)


def _turned(rows: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], *, paired: bool) -> torch.Tensor:
    """`rows [T, heads, D]` with each pair (i, i + D / 2) turned by its angle, by the products the learner makes.

    With `paired` as `keel.models.fitted` turns them, in float32 and with pairs side by side in the result; else as
    `transformers` does, every product and sum rounded to the type of `rows`.
    """
    cos, sin = turns
    if paired:
        pairs = torch.view_as_complex(torch.stack(rows.to(cos.dtype).chunk(2, dim=-1), dim=-1))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(rows.dtype)
    return rows * cos + rows.roll(rows.shape[-1] // 2, -1) * sin
