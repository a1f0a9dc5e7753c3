"""A model made exact: the modules that Keel's operators do not cover, and a measurement that this machine can.

Exact mode is a context (`keel.ops.numerics`) in which the operators below a model change; what is put in here is the
rest of the model: its linear layers, its activation, its table of rotations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from keel.ops import numerics
from keel.ops.attention.exact import KEY_BLOCK, tile_rows
from keel.ops.matmul import linear, product_in_tiles
from keel.types import UserFault

FAMILIES = ("gpt_oss", "qwen3", "qwen3_moe")
"""Model types whose every operator is known to be exact; tests hold each."""
TABLE_POSITIONS = 1024
"""Positions whose angles are made in one call: the same call, the same bits."""
PROBE_ORDERS = 3
PROBE_KEYS = 40
_fitted: dict[type[nn.Module], type[nn.Module]] = {}


class ExactNumericsError(UserFault, ValueError):
    """Exact mode cannot be had with this model, or on this machine; says what it was and what to do."""


def fit_exact(model: nn.Module) -> None:
    """Make the modules of `model` (adapters included) exact inside `exact_numerics`; outside, nothing changes.

    Raises ExactNumericsError for a family, attention, experts or rotation that was not made exact, and if the products
    of this machine's libraries are not.
    """
    _check(model)
    for module in model.get_decoder().modules():  # type: ignore[operator]
        kind = type(module)
        if kind is nn.Linear:
            module.__class__ = ExactLinear
        elif kind.__name__.endswith("RotaryEmbedding"):
            module.__class__ = _fitted.setdefault(kind, type(kind.__name__, (_ExactRotary, kind), {}))
        elif kind.__name__.endswith("MLP") and hasattr(module, "act_fn"):
            module.act_fn = ExactSilu()
    measure(model)


def _check(model: Any) -> None:
    config, device = model.config, next(model.parameters()).device
    if device.type != "cpu":
        raise ExactNumericsError(
            f'numerics = "exact" was measured on the CPU only, the model is on {device}; set device = "cpu"'
        )
    if config.model_type not in FAMILIES:
        raise ExactNumericsError(
            f'numerics = "exact": {config.model_type} was not made exact, {", ".join(FAMILIES)} were; '
            'set numerics = "fast"'
        )
    for name, found in (
        ("attention", config._attn_implementation),
        ("experts", getattr(config, "_experts_implementation", None) or "keel"),
    ):
        if found != "keel" and (name == "attention" or hasattr(config, "num_experts_per_tok")):
            raise ExactNumericsError(
                f'numerics = "exact" shares Keel\'s {name} between engine and learner, got model.{name} = {found!r}; '
                f'set model.{name} = "keel"'
            )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ExactNumericsError(f'numerics = "exact" has silu, the model {config.hidden_act!r}; set numerics = "fast"')
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if parameters.get("rope_type") in ("dynamic", "longrope"):
        raise ExactNumericsError(
            f'numerics = "exact": with rope_type = {parameters["rope_type"]!r} a position\'s rotation depends on the '
            'length of what is beside it; set numerics = "fast"'
        )


class ExactLinear(nn.Linear):
    """A linear layer in tiles inside `exact_numerics`, an ordinary one elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [.., in]` -> `[.., out]`."""
        if not numerics.is_exact():
            return functional.linear(x, self.weight, self.bias)
        made = linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return made.reshape(*x.shape[:-1], made.shape[-1])


class ExactSilu(nn.Module):
    """`keel.ops.numerics.silu` as a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return numerics.silu(x) if numerics.is_exact() else functional.silu(x)


class _ExactRotary:
    """Cosines and sines looked up in a table, which is made `TABLE_POSITIONS` at a time: torch's vectorized sine gives
    other bits at the end of a buffer than inside it."""

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids [1, T]` -> cos, sin `[1, T, ..]` in the type of `x`."""
        original = super().forward  # type: ignore[misc]
        if not numerics.is_exact():
            made: tuple[torch.Tensor, torch.Tensor] = original(x, position_ids)
            return made
        tables: list[tuple[torch.Tensor, torch.Tensor]] = self.__dict__.setdefault("_keel_tables", [])
        wide = torch.empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        if tables and (tables[0][0].dtype, tables[0][0].device) != (wide.dtype, wide.device):
            tables.clear()
        while len(tables) * TABLE_POSITIONS <= int(position_ids.max()):
            first = len(tables) * TABLE_POSITIONS
            places = torch.arange(first, first + TABLE_POSITIONS, device=x.device)
            cos, sin = original(wide, places[None])
            tables.append((cos[0], sin[0]))
        cos, sin = (torch.cat(parts)[position_ids].to(x.dtype) for parts in zip(*tables, strict=True))
        return cos, sin


@torch.no_grad()
def measure(model: nn.Module) -> None:
    """Raise ExactNumericsError if, with this processor, library and number of threads, a row's bits depend on others.

    Each width of product that the model has is made of a tile of random rows, in another order, and of a row alone; so
    are the attention's products and softmax, with more keys beside them than a row sees.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {(p.shape[-2:], p.dtype, p.stride()[-2:]) for p in model.parameters() if p.dim() >= 2}
    weights = {
        key: next(p for p in model.parameters() if p.dim() >= 2 and (p.shape[-2:], p.dtype, p.stride()[-2:]) == key)
        for key in shapes
    }
    wrong = []
    for (shape, dtype, _), parameter in weights.items():
        weight = parameter.detach()[0] if parameter.dim() == 3 else parameter.detach()
        rights = (weight, weight.t()) if parameter.dim() == 3 else (weight.t(),)
        if not all(_rows_alone(right, generator) for right in rights):
            wrong.append(f"{tuple(shape)} in {str(dtype).removeprefix('torch.')}")
    if not _attention_alone(generator):
        wrong.append("attention")
    if wrong:
        raise ExactNumericsError(
            f'numerics = "exact": on this machine, with {torch.get_num_threads()} threads, a row of a product has '
            f"other bits beside other rows ({', '.join(sorted(set(wrong)))}); set num_threads = 1, or "
            'numerics = "fast"'
        )


def _rows_alone(right: torch.Tensor, generator: torch.Generator) -> bool:
    rows = numerics.TILE_ROWS
    left = torch.randn(rows, right.shape[0], generator=generator).to(right.dtype)
    whole = product_in_tiles(left, right)
    for _ in range(PROBE_ORDERS):
        order = torch.randperm(rows, generator=generator)
        if not torch.equal(product_in_tiles(left[order], right), whole[order]):
            return False
    return torch.equal(product_in_tiles(left[:1], right), whole[:1])


def _attention_alone(generator: torch.Generator) -> bool:
    """Products of attention in another order of rows and batch; a softmax with hidden columns behind it."""
    rows = tile_rows(1)
    query = torch.randn(PROBE_KEYS, rows, 64, generator=generator)
    keys = torch.randn(PROBE_KEYS, KEY_BLOCK, 64, generator=generator)
    order = torch.randperm(rows, generator=generator)
    scores = torch.bmm(query, keys.transpose(1, 2))
    same = torch.equal(torch.bmm(query[:1, order], keys[:1].transpose(1, 2)), scores[:1, order])
    longer = functional.pad(scores, (0, 3 * KEY_BLOCK), value=float("-inf"))
    weights = torch.softmax(scores, -1)
    same = same and torch.equal(torch.softmax(longer[3:4], -1)[..., :KEY_BLOCK], weights[3:4])
    out = torch.bmm(weights, keys)
    return same and torch.equal(torch.bmm(weights[5:6, order], keys[5:6]), out[5:6, order])
