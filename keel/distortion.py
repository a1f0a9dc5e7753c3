"""A fault to be planted: which cause, how strong, where; plain values, no torch.

`keel.engines.distorted` plants it in an engine, `keel.learner.distorted` in the learner; docs/faults.md has the table
of what each strength means. Strength 0 plants nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from keel.causes import CAUSES, Side
from keel.types import SamplingSettings, UserFault


class DistortionError(UserFault, ValueError):
    """A fault that cannot be planted as asked."""


@dataclass(frozen=True, slots=True)
class Strength:
    """What a cause's strength means, from `low` to `high`, and where a random one is visible (`shown`, signs apart).

    `whole` strengths are numbers of things. `groups` are the values `group` may have; None: any.
    """

    meaning: str
    low: float
    high: float
    shown: tuple[tuple[float, float], ...]
    whole: bool = False
    groups: tuple[str, ...] | None = ("",)


STRENGTHS: Mapping[str, Strength] = MappingProxyType(
    {
        "sinks_dropped": Strength("share of exp(sink) that is missing; 1 drops the sink", 0, 1, ((0.3, 1),)),
        "window_off": Strength("share of the layers with a window that lose it, the first first", 0, 1, ((1, 1),)),
        "window_off_by_one": Strength(
            "tokens the window is longer (shorter: negative)", -8, 8, ((-2, -1), (1, 2)), True
        ),
        "wrong_temperature": Strength(
            "relative error: temperature times 1 + strength", -0.9, 9, ((-0.4, -0.08), (0.1, 0.6))
        ),
        "raw_logprobs": Strength("share of replies", 0, 1, ((0.5, 1),)),
        "top_p_not_undone": Strength("probability that is cut off: top_p is 1 - strength", 0, 0.99, ((0.05, 0.5),)),
        "stale_version": Strength("versions behind", 0, 64, ((1, 3),), True),
        "stale_tensor_group": Strength(
            "share of every update that the tensors of `group` miss", 0, 1, ((0.5, 1),), groups=None
        ),
        "transposed_experts": Strength("share of experts", 0, 1, ((0.3, 1),), groups=("", "transposed", "exchanged")),
        "router_flips": Strength(
            "share of a layer's tokens aimed at", 0, 0.5, ((0.02, 0.3),), groups=("", "weights", "module")
        ),
        "bfloat16_noise": Strength(
            "times the rounding of bfloat16", 0, 16, ((0.5, 4),), groups=("", "weights", "logprobs")
        ),
        "wrong_rope_scaling": Strength(
            "relative error of a rotary parameter: it is times 1 + strength",
            -0.9,
            9,
            ((-0.6, -0.2), (0.25, 3)),
            groups=("", "rope_theta", "factor", "original_max_position_embeddings"),
        ),
        "wrong_template": Strength("tokens at the beginning of the prompt that are left out", 0, 64, ((1, 4),), True),
        "retokenized_turns": Strength("share of an earlier reply's tokens that come back in two", 0, 1, ((0.3, 1),)),
        "lost_stop_token": Strength("share of replies", 0, 1, ((0.5, 1),)),
        "shifted_logprobs": Strength(
            "places later (earlier: negative) that log-probs stand", -8, 8, ((-1, -1), (1, 1)), True
        ),
        "wrong_padding": Strength(
            "padding tokens seen before the prompt, or counted after it",
            0,
            256,
            ((1, 16),),
            True,
            groups=("", "attended", "positions"),
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Distortion:
    """`cause` (a key of `keel.causes.CAUSES`) planted at `strength`; what that means is in `STRENGTHS`.

    `seed` decides whatever is drawn: which experts, which replies, which noise. `group` narrows it down where the cause
    allows (a tensor group, a rotary parameter), `layer` to one layer where the cause has layers. Raises
    DistortionError, a ValueError, for an unknown cause, a strength outside its range, or a group it does not have.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    cause: str
    strength: float = 1.0
    seed: int = 0
    group: str = ""
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.cause not in CAUSES:
            raise DistortionError(f"distortion: got cause {self.cause!r}; known: {', '.join(CAUSES)}")
        told = STRENGTHS[self.cause]
        fits = told.low <= self.strength <= told.high and (not told.whole or self.strength == int(self.strength))
        if not fits:
            kind = "a whole number" if told.whole else "a number"
            raise DistortionError(
                f"{self.cause}: got strength {self.strength}; it is {kind} from {told.low:g} to {told.high:g} "
                f"({told.meaning})"
            )
        if told.groups is not None and self.group not in told.groups:
            known = ", ".join(repr(group) for group in told.groups)
            raise DistortionError(f"{self.cause}: got group {self.group!r}; it may be {known}")
        if self.cause == "stale_tensor_group" and not self.group:
            raise DistortionError("stale_tensor_group: got no group; name the tensor group that no update reaches")
        if self.layer is not None and self.cause not in LAYERED:
            raise DistortionError(f"{self.cause}: got layer {self.layer}; only {', '.join(LAYERED)} have layers")

    @property
    def acts(self) -> bool:
        """Whether anything is planted at all."""
        return self.strength != 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`; `Distortion(**values)` reads them."""
        return asdict(self)

    def __str__(self) -> str:
        where = [self.group] if self.group else []
        where += [] if self.layer is None else [f"layer {self.layer}"]
        return f"{self.cause} {self.strength:g}" + (f" ({', '.join(where)})" if where else "")


LAYERED = (
    "sinks_dropped",
    "window_off",
    "stale_tensor_group",
    "transposed_experts",
    "router_flips",
    "bfloat16_noise",
)
EXPERTS = ("transposed_experts", "router_flips")
WINDOWS = ("window_off", "window_off_by_one")


class Traits(Protocol):
    """What `random_distortions` asks of a model; `keel.models.info.ModelInfo` has it."""

    @property
    def model_type(self) -> str: ...

    @property
    def layer_windows(self) -> tuple[int | None, ...]: ...

    @property
    def num_moe_layers(self) -> int: ...

    @property
    def tied_embeddings(self) -> bool: ...


def applies(cause: str, side: Side, info: Traits, sampling: SamplingSettings) -> bool:
    """Whether `cause` can be seen on `side` of a model like `info` that is sampled with `sampling`."""
    cut = sampling.top_p < 1 or sampling.top_k > 0
    if cause == "sinks_dropped":
        return info.model_type == "gpt_oss"
    if cause in WINDOWS:
        return any(info.layer_windows)
    if cause in EXPERTS:
        return info.num_moe_layers > 0
    if cause == "raw_logprobs":
        return sampling.temperature != 1 or cut
    if cause == "top_p_not_undone":
        return cut or side == "engine"
    return True


def random_distortions(
    rng: random.Random,
    count: int,
    side: Side,
    info: Traits,
    sampling: SamplingSettings,
    *,
    among: Collection[str] = (),
) -> list[Distortion]:
    """`count` different causes that apply to the model, each at a strength where it can be seen.

    `among` restricts the causes (empty: all of them). Raises DistortionError if fewer than `count` apply.
    """
    kinds = [cause for cause in CAUSES if (not among or cause in among) and applies(cause, side, info, sampling)]
    if count > len(kinds):
        raise DistortionError(f"random_distortions: got count {count}; {len(kinds)} apply: {', '.join(kinds)}")
    return [_random(rng, cause, side, info) for cause in rng.sample(kinds, count)]


def _random(rng: random.Random, cause: str, side: Side, info: Traits) -> Distortion:
    told = STRENGTHS[cause]
    low, high = rng.choice(told.shown)
    strength = rng.randint(round(low), round(high)) if told.whole else round(rng.uniform(low, high), 4)
    group = ""
    if cause == "stale_tensor_group":
        group = rng.choice(tensor_group_names(info))
    elif cause == "router_flips" and side == "learner":
        group = "module"
    elif cause == "transposed_experts":
        group = rng.choice(("transposed", "exchanged"))
    return Distortion(cause, strength, seed=rng.randrange(1 << 31), group=group)


def tensor_group_names(info: Traits) -> Sequence[str]:
    """Groups of weight tensors of a model like `info`, by the names of `keel.sync.groups`, that make a difference."""
    names = [f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")] + ["embed"]
    if info.model_type == "gpt_oss":
        names.append("attention.sinks")
    if info.num_moe_layers:
        names += ["experts.gate_up_proj", "experts.down_proj", "router"]
    if not info.tied_embeddings:
        names.append("head")
    return names


def share_of(items: int, share: float) -> int:
    """How many of `items` a `share` above 0 takes: at least one."""
    return min(items, max(1, math.ceil(items * share - 1e-9)))


def planted_metrics(engine: Sequence[Distortion], learner: Sequence[Distortion]) -> dict[str, float]:
    """How many faults a run has on purpose, for every row: `faults/engine` and `faults/learner`; {} if none."""
    counts = {"faults/engine": engine, "faults/learner": learner}
    acting = {name: float(sum(each.acts for each in faults)) for name, faults in counts.items()}
    return acting if any(acting.values()) else {}


def describe_planted(engine: Sequence[Distortion], learner: Sequence[Distortion]) -> str:
    """One line about the faults that a run was given on purpose; empty if none."""
    sides = {"engine": engine, "learner": learner}
    told = [f"{each} in the {side}" for side, faults in sides.items() for each in faults if each.acts]
    return f"faults are planted on purpose, trust nothing in this run: {'; '.join(told)}" if told else ""
