"""What may be computed, read or reported otherwise: every hypothesis that a gap is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from keel.causes import Side
from keel.preflights.diagnosis_evidence import Evidence, Readout, StackFacts
from keel.preflights.diagnosis_readings import Reading, readable
from keel.preflights.reference import Reference
from keel.preflights.reference_changes import EXPERT_CHANGES, Change

TEMPERATURES = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)
RATIOS = (0.25, 0.5, 2.0, 4.0)
SHARES = (0.5, 1.0)
PADS = range(1, 17)
MOST_EXPERTS = 16
"""Up to so many, it is tried expert by expert which of them are concerned."""


@dataclass(frozen=True)
class Hypothesis:
    """One thing done otherwise than the model's directory and the request say, under the name of its cause.

    Exactly one of `change` (in the model), `reading` (of the tokens) and `readout` (of the logits) is set. `grid` holds
    the first values of a strength that has to be fitted; empty if there is nothing to fit. `group` names tensors.
    `some` "experts" or "replies" says that it may be true of some of them, to be found out.
    """

    cause: str
    change: Change | None = None
    reading: Reading | None = None
    readout: Readout | None = None
    grid: tuple[float, ...] = ()
    group: str = ""
    some: str = ""

    @property
    def layer(self) -> int | None:
        return self.change.layer if self.change is not None else None

    @property
    def strength(self) -> float | None:
        if self.change is not None:
            return self.change.value
        if self.reading is not None:
            return float(self.reading.value)
        assert self.readout is not None
        told = (self.readout.top_p, self.readout.temperature, float(self.readout.shift) or None)
        return next((value for value in told if value is not None), None)

    @property
    def is_fitted(self) -> bool:
        """Does it have a strength, or members, that are found out?"""
        return bool(self.grid or self.some)

    def at(self, value: float) -> Hypothesis:
        """The same with another strength."""
        if self.change is not None:
            return replace(self, change=replace(self.change, value=value))
        if self.reading is not None:
            return replace(self, reading=replace(self.reading, value=round(value)))
        assert self.readout is not None
        if self.readout.top_p is not None:
            return replace(self, readout=replace(self.readout, top_p=min(value, 1.0)))
        return replace(self, readout=replace(self.readout, temperature=value))

    @property
    def text(self) -> str:
        part = self.change or self.reading or self.readout
        kind = getattr(part, "kind", "readout")
        detail = getattr(part, "detail", "")
        return f"{kind} {detail}".strip().replace("_", " ")


def hypotheses(reference: Reference, evidence: Evidence, facts: StackFacts, side: Side) -> list[Hypothesis]:
    """All that can be told apart on this model, of this side; the plainest and cheapest first."""
    found = [*_readouts(evidence, side), *_model(reference, facts), *_stale(reference), *_routes(evidence, side)]
    for reading in _readings(facts):
        if reading[1].kind == "without_ends" and side == "engine":
            continue
        if readable(reading[1], evidence, facts):
            found.append(Hypothesis(reading[0], reading=reading[1]))
    return sorted(found, key=_cost)


def _cost(hypothesis: Hypothesis) -> tuple[bool, bool, bool]:
    """What takes no pass first, then what takes one, then what has to be fitted; all layers before single ones."""
    is_free = hypothesis.readout is not None
    return not is_free, hypothesis.is_fitted and not is_free, hypothesis.layer is not None


def _readouts(evidence: Evidence, side: Side) -> Iterator[Hypothesis]:
    asked = set(evidence.temperature.tolist())
    if evidence.is_cut and side == "learner":
        yield Hypothesis("top_p_not_undone", readout=Readout(cut=False))
    if asked != {1.0} or evidence.is_cut:
        yield Hypothesis("raw_logprobs", readout=Readout(temperature=1.0, cut=False))
        yield Hypothesis("raw_logprobs", readout=Readout(temperature=1.0, cut=False), some="replies")
    if side == "engine":
        if evidence.is_cut:
            yield Hypothesis("top_p_not_undone", readout=Readout(cut=False))
        yield Hypothesis("top_p_not_undone", readout=Readout(top_p=1.0), grid=(0.5, 0.7, 0.9))
    usual = sum(asked) / len(asked)
    yield Hypothesis(
        "wrong_temperature", readout=Readout(temperature=1.0), grid=tuple(usual * ratio for ratio in TEMPERATURES)
    )
    for shift in (-1, 1, -2, 2):
        yield Hypothesis("shifted_logprobs", readout=Readout(shift=shift))
    yield Hypothesis("bfloat16_noise", readout=Readout(rounded=True))


def _model(reference: Reference, facts: StackFacts) -> Iterator[Hypothesis]:
    layers: list[int | None] = [None, *range(reference.info.num_layers)]
    windowed = [None, *(layer for layer, window in enumerate(reference.info.layer_windows) if window is not None)]
    if facts.dtype != "bfloat16":
        yield Hypothesis("bfloat16_noise", Change("weights_bfloat16"))
        yield Hypothesis("bfloat16_noise", Change("weights_bfloat16"), grid=(0.5, 1.0, 2.0, 4.0))
        yield Hypothesis("bfloat16_noise", Change("bfloat16"))
    if reference.has_sinks:
        for layer in layers:
            yield Hypothesis("sinks_dropped", Change("sinks", layer=layer))
        yield Hypothesis("sinks_dropped", Change("sinks"), grid=(0.3, 0.6, 0.9))
        yield Hypothesis("sinks_dropped", Change("sinks", detail="scaled"), grid=SHARES)
    if len(windowed) > 1:
        for layer in windowed:
            yield Hypothesis("window_off", Change("window", layer=layer, detail="off"))
        for layer in windowed:
            for tokens in (1, -1, 2, -2) if layer is None else (1, -1):
                yield Hypothesis("window_off_by_one", Change("window", tokens, layer=layer))
    yield from _rope(reference)
    yield from _experts(reference, layers)


def _rope(reference: Reference) -> Iterator[Hypothesis]:
    numbers = reference.model.config.rope_parameters
    if not isinstance(numbers, dict) or "rope_type" not in numbers:
        return  # one set of numbers per kind of layer: nothing here is fitted to that
    yield Hypothesis("wrong_rope_scaling", Change("rope", detail="theta"), grid=RATIOS)
    yield Hypothesis("wrong_rope_scaling", Change("rope", detail="linear"), grid=RATIOS)
    if numbers["rope_type"] == "default":
        return
    yield Hypothesis("wrong_rope_scaling", Change("rope", detail="none"))
    yield Hypothesis("wrong_rope_scaling", Change("rope", detail="attention"), grid=(0.8, 1.25))
    if "factor" in numbers:
        yield Hypothesis("wrong_rope_scaling", Change("rope", detail="factor"), grid=RATIOS)
    if "original_max_position_embeddings" in numbers:
        yield Hypothesis("wrong_rope_scaling", Change("rope", detail="original"), grid=RATIOS)


def _experts(reference: Reference, layers: list[int | None]) -> Iterator[Hypothesis]:
    names = [name for name, _ in reference.model.named_parameters()]
    if any("experts.gate_up_proj" in name for name in names):
        kinds: tuple[str, ...] = EXPERT_CHANGES
    elif any(".gate_proj." in name for name in names):
        kinds = EXPERT_CHANGES[:1]
    else:
        return
    for detail in kinds:
        yield Hypothesis("transposed_experts", Change("experts", detail=detail))
    for detail in kinds if 1 < reference.info.num_experts <= MOST_EXPERTS else ():
        if detail in ("gate_up_exchanged", "all_transposed"):
            yield Hypothesis("transposed_experts", Change("experts", detail=detail, experts=()), some="experts")
    for layer in layers[1:]:
        for detail in kinds:
            yield Hypothesis("transposed_experts", Change("experts", layer=layer, detail=detail))


def _stale(reference: Reference) -> Iterator[Hypothesis]:
    from keel.sync.groups import tensor_groups

    groups = tensor_groups(name for name, _ in reference.model.named_parameters())
    for version, state in enumerate(reference.earlier):
        yield Hypothesis("stale_version", Change("stale", detail=f"{version}:"))
        for group, names in groups.items():
            if any(name in state for name in names):
                change = Change("stale", detail=f"{version}:{group}")
                yield Hypothesis("stale_tensor_group", change, group=group)
                yield Hypothesis("stale_tensor_group", change, group=group, grid=(0.5, 0.8))


def _routes(evidence: Evidence, side: Side) -> Iterator[Hypothesis]:
    if any(evidence.routes_of(side, index) is not None for index in range(len(evidence.sequences))):
        yield Hypothesis("router_flips", reading=Reading("routes", token=0 if side == "engine" else 1))


def _readings(facts: StackFacts) -> Iterator[tuple[str, Reading]]:
    for count in PADS:
        yield "wrong_padding", Reading("pads", count, facts.pad_token_id or 0)
    for count in range(1, 9):
        yield "wrong_template", Reading("without_first", count)
    for count in (1, 2, 4, 8, 16):
        yield "wrong_padding", Reading("gap", count)
    yield "lost_stop_token", Reading("without_ends")
    yield "retokenized_turns", Reading("retokenized")
    yield "lost_stop_token", Reading("without_stop")
    for count in (1, 2, 3):
        yield "wrong_template", Reading("without_last", count)
    yield "wrong_template", Reading("forgotten")
