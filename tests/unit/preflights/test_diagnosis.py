"""What is computed otherwise is named: log-probs made by plain `transformers` models that are changed here by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from keel.preflights.diagnosis import chosen_probes, diagnose
from keel.preflights.diagnosis_evidence import StackFacts
from keel.preflights.reference import Feed, Reference
from keel.preflights.stack import ProbeData, ProbeSequence, Reply, TrainerScores
from keel.types import SamplingSettings

VOCAB = 320
STOP = 319
AS_IT_IS = SamplingSettings()
SMALL = {
    "gpt_oss": {"num_hidden_layers": 2, "sliding_window": 9},
    "qwen3": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 2, "mlp_only_layers": []},
}
Model = Any
LogProbs = Callable[[ProbeSequence], np.ndarray]


@pytest.fixture(scope="module")
def directory(tiny_checkpoint) -> Callable[[str], str]:
    return lambda preset: tiny_checkpoint(preset, **SMALL[preset])


def load(path: str, **changed: Any) -> Model:
    """The model with fields of its configuration changed; the fused kernel where the family has one."""
    config = AutoConfig.from_pretrained(path)
    for name, value in changed.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()


def drawn_probes(path: str, sampling: SamplingSettings = AS_IT_IS, count: int = 4) -> list[ProbeSequence]:
    """Two replies of 14 tokens in every sequence, really drawn; nothing is said of them yet."""
    model = load(path)
    found = []
    for number in range(count):
        torch.manual_seed(number)
        ids = torch.randint(0, VOCAB - 1, (1, 6 + 3 * number))
        replies = []
        for turn in range(2):
            start = ids.shape[1]
            if turn:
                ids = torch.cat([ids, torch.randint(0, VOCAB - 1, (1, 5))], dim=1)
                start = ids.shape[1]
            for _ in range(14):
                with torch.no_grad():
                    probs = (model(ids).logits[0, -1] / sampling.temperature).softmax(-1)
                probs[STOP] = 0.0
                ids = torch.cat([ids, torch.multinomial(probs * _kept(probs[None], sampling.top_p)[0], 1)[None]], dim=1)
            replies.append(Reply(start, ids.shape[1], "length"))
        tokens = ids[0].numpy()
        turns = np.full(len(tokens), -1)
        for turn, reply in enumerate(replies):
            turns[reply.start : reply.stop] = turn
        nothing = np.full(len(tokens), np.nan, np.float32)
        found.append(ProbeSequence(tokens, turns >= 0, turns, nothing, sampling, 0, "random", tuple(replies)))
    return found


def _kept(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = probs.sort(dim=-1, descending=True)
    return torch.zeros_like(probs).scatter(1, order, ((ordered.cumsum(-1) - ordered) < top_p).float())


def told_by(
    model: Model,
    *,
    temperature: float | None = None,
    before: tuple[int, ...] = (),
    without: int = 0,
    top_p: float = 1.0,
) -> LogProbs:
    """What `model` says of a sequence's tokens, `[n]`; `before` stands before it, its first `without` are missing."""

    def say(sequence: ProbeSequence) -> np.ndarray:
        tokens = [*before, *sequence.token_ids[without:].tolist()]
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        scaled = logits / (temperature or sequence.sampling.temperature)
        if top_p < 1:
            scaled = scaled.masked_fill(_kept(scaled.softmax(-1), top_p) == 0, -torch.inf)
        values = scaled.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        padded = np.concatenate([np.full(1 + without, np.nan), values])[len(before) :]
        return padded[: len(sequence)] if not before else padded[-len(sequence) :]

    return say


def data_of(probes: list[ProbeSequence], engine: LogProbs | None, learner: LogProbs | None = None) -> ProbeData:
    if engine is not None:
        probes = [
            replace(each, engine_logprobs=np.where(each.drawn, engine(each), np.nan).astype(np.float32))
            for each in probes
        ]
    trainer = tuple(TrainerScores(learner(each).astype(np.float32)) for each in probes) if learner is not None else ()
    return ProbeData(tuple(probes), trainer)


def named(path: str, data: ProbeData, **facts: Any) -> list[tuple[str, str | None]]:
    found = diagnose(
        Reference.load(path, served_as=facts.get("dtype", "float32")), data, StackFacts(**facts), budget_s=600
    )
    return [(each.cause, each.side) for each in found]


def without_sinks(model: Model, layers: tuple[int, ...] = (0, 1)) -> Model:
    for layer in layers:
        model.model.layers[layer].self_attn.sinks.data.fill_(-1e4)
    return model


def with_theta(path: str, factor: float) -> Model:
    rope = copy.deepcopy(AutoConfig.from_pretrained(path).rope_parameters)
    rope["rope_theta"] *= factor
    return load(path, rope_parameters=rope)


def with_experts(model: Model, change: Callable[[torch.Tensor], torch.Tensor], name: str) -> Model:
    for layer in model.model.layers:
        parameter = getattr(layer.mlp.experts, name)
        parameter.data = change(parameter.data)
    return model


def transposed(weights: torch.Tensor) -> torch.Tensor:
    return weights.transpose(1, 2).contiguous().view(weights.shape)


def halves_exchanged(weights: torch.Tensor) -> torch.Tensor:
    middle = weights.shape[1] // 2
    return torch.cat([weights[:, middle:], weights[:, :middle]], dim=1)


def rounded(model: Model) -> Model:
    return model.bfloat16().float()


MODEL_FAULTS = [
    ("gpt_oss", "sinks_dropped", lambda path: without_sinks(load(path))),
    ("gpt_oss", "window_off", lambda path: load(path, sliding_window=4096)),
    ("gpt_oss", "window_off_by_one", lambda path: load(path, sliding_window=10)),
    ("gpt_oss", "window_off_by_one", lambda path: load(path, sliding_window=8)),
    ("gpt_oss", "transposed_experts", lambda path: with_experts(load(path), transposed, "down_proj")),
    ("gpt_oss", "bfloat16_noise", lambda path: rounded(load(path))),
    ("qwen3", "wrong_rope_scaling", lambda path: with_theta(path, 0.4)),
    ("qwen3_moe", "wrong_rope_scaling", lambda path: with_theta(path, 3.0)),
    ("qwen3_moe", "transposed_experts", lambda path: with_experts(load(path), halves_exchanged, "gate_up_proj")),
]


@pytest.mark.parametrize(("preset", "cause", "make"), MODEL_FAULTS)
def test_a_model_that_computes_otherwise_is_named_with_its_side(directory, preset, cause, make):
    path = directory(preset)
    probes = drawn_probes(path)
    right = told_by(load(path))
    side = "engine" if len(cause) % 2 else "learner"  # the same search either way
    wrong = told_by(make(path))
    told = data_of(probes, wrong, right) if side == "engine" else data_of(probes, right, wrong)
    assert named(path, told) == [(cause, side)]


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_named_of_healthy_sides(directory, preset, dtype):
    path = directory(preset)
    served = load(path).to(getattr(torch, dtype))
    other = load(path).to(getattr(torch, dtype))
    other.set_attn_implementation("eager")
    assert named(path, data_of(drawn_probes(path), told_by(served), told_by(other)), dtype=dtype) == []


def test_one_layer_without_sinks_is_told_from_all(directory):
    path = directory("gpt_oss")
    data = data_of(drawn_probes(path), told_by(without_sinks(load(path), (1,))))
    (row,) = diagnose(Reference.load(path), data)
    assert (row.cause, row.layer) == ("sinks_dropped", 1)
    assert row.explained > 0.99
    assert row.gap_after < 0.01 * row.gap_before


@pytest.mark.parametrize("temperature", [0.55, 0.93, 1.31, 2.2])
def test_a_temperature_is_fitted(directory, temperature):
    path = directory("qwen3")
    data = data_of(drawn_probes(path), told_by(load(path), temperature=temperature))
    (row,) = diagnose(Reference.load(path), data)
    assert row.cause == "wrong_temperature"
    assert row.strength == pytest.approx(temperature, rel=1e-3)


@pytest.mark.parametrize("factor", [0.5, 1.3, 3.4])
def test_a_rotary_base_is_fitted(directory, factor):
    path = directory("qwen3")
    (row,) = diagnose(Reference.load(path), data_of(drawn_probes(path), told_by(with_theta(path, factor))))
    assert row.cause == "wrong_rope_scaling"
    assert row.strength == pytest.approx(factor, rel=0.01)


def test_raw_log_probs_of_some_replies_are_told_from_another_temperature(directory):
    path = directory("qwen3")
    probes = drawn_probes(path, SamplingSettings(temperature=0.7))
    model = load(path)
    asked, raw = told_by(model), told_by(model, temperature=1.0)

    def some(sequence: ProbeSequence) -> np.ndarray:
        return np.where(sequence.turn == len(sequence) % 2, raw(sequence), asked(sequence))

    (row,) = diagnose(Reference.load(path), data_of(probes, some))
    assert (row.cause, row.side) == ("raw_logprobs", "engine")


def test_a_cut_that_nobody_told_is_named_and_its_size_fitted(directory):
    path = directory("qwen3")
    probes = drawn_probes(path, SamplingSettings(top_p=0.8))
    model = load(path)
    probes = [replace(each, sampling=SamplingSettings()) for each in probes]
    (row,) = diagnose(Reference.load(path), data_of(probes, told_by(model, top_p=0.8), told_by(model)))
    assert (row.cause, row.side) == ("top_p_not_undone", "engine")
    assert row.strength == pytest.approx(0.8, abs=0.02)


def test_a_learner_that_does_not_replay_a_cut_is_named(directory):
    path = directory("qwen3")
    probes = drawn_probes(path, SamplingSettings(top_p=0.8))
    model = load(path)
    data = data_of(probes, told_by(model, top_p=0.8), told_by(model))
    assert named(path, data) == [("top_p_not_undone", "learner")]


@pytest.mark.parametrize("places", [-1, 1])
def test_log_probs_at_another_token_are_named(directory, places):
    path = directory("qwen3")
    right = told_by(load(path))

    def moved(sequence: ProbeSequence) -> np.ndarray:
        values = right(sequence)
        for reply in sequence.replies:
            values[reply.start : reply.stop] = np.roll(values[reply.start : reply.stop], places)
        return values

    (row,) = diagnose(Reference.load(path), data_of(drawn_probes(path), moved))
    assert (row.cause, row.strength) == ("shifted_logprobs", -places)


def test_padding_that_is_seen_and_a_beginning_that_is_missing_are_told_apart(directory):
    path = directory("gpt_oss")
    probes, model = drawn_probes(path), load(path)
    (row,) = diagnose(
        Reference.load(path), data_of(probes, told_by(model, before=(7,) * 5)), StackFacts(pad_token_id=7)
    )
    assert (row.cause, row.strength) == ("wrong_padding", 5)
    (row,) = diagnose(Reference.load(path), data_of(probes, None, told_by(model, without=2)))
    assert (row.cause, row.side, row.strength) == ("wrong_template", "learner", 2)


def test_old_weights_are_told_from_one_group_of_them(directory):
    path = directory("qwen3")
    probes, new, old = drawn_probes(path), Reference.load(path), load(path)
    generator = torch.Generator().manual_seed(0)
    earlier = {}
    for name, parameter in old.named_parameters():
        earlier[name] = parameter.detach() * (1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    mixed = load(path)
    for name, parameter in mixed.named_parameters():
        if "k_proj" in name:
            parameter.data = earlier[name]
    for name, parameter in old.named_parameters():
        parameter.data = earlier[name]
    facts = StackFacts(earlier=(earlier,))
    (row,) = diagnose(new, data_of(probes, told_by(old)), facts)
    assert row.cause == "stale_version"
    (row,) = diagnose(new, data_of(probes, told_by(mixed)), facts)
    assert (row.cause, row.group) == ("stale_tensor_group", "attention.k_proj")


PAIRS = [
    (
        "gpt_oss",
        {"sinks_dropped", "wrong_temperature"},
        lambda path: told_by(without_sinks(load(path)), temperature=1.2),
    ),
    (
        "gpt_oss",
        {"window_off_by_one", "wrong_padding"},
        lambda path: told_by(load(path, sliding_window=8), before=(0,) * 3),
    ),
    ("gpt_oss", {"wrong_padding", "wrong_template"}, lambda path: told_by(load(path), before=(0,) * 4, without=2)),
    ("qwen3", {"wrong_rope_scaling", "wrong_template"}, lambda path: told_by(with_theta(path, 0.4), without=2)),
    (
        "qwen3_moe",
        {"transposed_experts", "bfloat16_noise"},
        lambda path: told_by(with_experts(rounded(load(path)), halves_exchanged, "gate_up_proj")),
    ),
]


@pytest.mark.parametrize(("preset", "causes", "make"), PAIRS)
def test_both_of_two_causes_are_named(directory, preset, causes, make):
    path = directory(preset)
    found = diagnose(Reference.load(path), data_of(drawn_probes(path), make(path)), budget_s=600)
    assert {each.cause for each in found} == causes
    assert sum(each.explained for each in found) == pytest.approx(1.0, abs=0.01)


def test_a_fault_on_each_side_is_told_by_its_side(directory):
    path = directory("gpt_oss")
    data = data_of(drawn_probes(path), told_by(load(path), temperature=1.3), told_by(without_sinks(load(path))))
    assert set(named(path, data)) == {("wrong_temperature", "engine"), ("sinks_dropped", "learner")}


def test_an_earlier_reply_in_other_tokens_is_told_by_first_replies_that_are_right(directory):
    path = directory("qwen3")
    right, generator = told_by(load(path)), np.random.default_rng(0)

    def reads_otherwise(sequence: ProbeSequence) -> np.ndarray:
        first, second = sequence.replies
        tokens = sequence.token_ids.copy()
        tokens[first.start : first.stop] = generator.integers(0, VOCAB - 1, first.stop - first.start)
        values = right(sequence)
        values[second.start :] = right(replace(sequence, token_ids=tokens))[second.start :]
        return values

    assert named(path, data_of(drawn_probes(path), reads_otherwise)) == [("retokenized_turns", "engine")]


def test_a_gap_that_nothing_explains_is_said_to_be_unexplained(directory):
    path = directory("qwen3")
    model, generator = load(path), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    found = diagnose(Reference.load(path), data_of(drawn_probes(path), told_by(model)), budget_s=600)
    assert [each.cause for each in found] == ["unexplained"]
    assert found[0].explained == pytest.approx(1.0)


def test_lost_stop_tokens_show_in_the_replies_and_in_what_the_learner_does_not_say(directory):
    path = directory("qwen3")
    probes, right = drawn_probes(path), told_by(load(path))
    stopped = [
        replace(each, replies=tuple(replace(reply, finish_reason="stop") for reply in each.replies)) for each in probes
    ]
    (row,) = diagnose(Reference.load(path), data_of(stopped, right, right), StackFacts(stop_token_ids=(STOP,)))
    assert (row.cause, row.side, row.strength) == ("lost_stop_token", "engine", 1.0)

    def without_ends(sequence: ProbeSequence) -> np.ndarray:
        ends = [reply.stop - 1 for reply in sequence.replies]
        kept = np.setdiff1d(np.arange(len(sequence)), ends)
        values = np.zeros(len(sequence))
        values[kept] = right(replace(sequence, token_ids=sequence.token_ids[kept]))
        return values

    (row,) = diagnose(Reference.load(path), data_of(probes, right, without_ends))
    assert (row.cause, row.side) == ("lost_stop_token", "learner")
    assert row.explained > 0.98


def test_the_reference_is_the_plain_model_and_stays_it(directory):
    path = directory("gpt_oss")
    reference, plain = Reference.load(path), load(path)
    feeds = [Feed(tuple(range(3, 40)), tuple(range(36))), Feed(tuple(range(90, 110)), tuple(range(4, 19)))]
    with torch.no_grad():
        wanted = torch.cat([plain(torch.tensor([each.token_ids])).logits[0, list(each.wanted)] for each in feeds])
    before = reference.logits(feeds)
    assert (before - wanted).abs().max() < 1e-4
    probes = drawn_probes(path, count=3)
    diagnose(reference, data_of(probes, told_by(with_theta(path, 2.0), temperature=1.1)), budget_s=600)
    assert torch.equal(reference.logits(feeds), before)


def test_probes_that_are_too_many_are_thinned_out_evenly(directory):
    probes = drawn_probes(directory("qwen3"), count=8)
    few = chosen_probes(ProbeData(tuple(probes)), 150.0)
    assert 2 <= len(few.sequences) < 5
    assert few.sequences[0] is probes[0]
    assert few.sequences[-1] is probes[-1]
