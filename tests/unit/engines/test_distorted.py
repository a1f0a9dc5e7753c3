"""Faults planted in an engine: each is the fault that plain `transformers` has when it is made by hand there."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from keel.causes import CAUSES
from keel.config import EngineConfig, ModelConfig
from keel.distortion import Distortion, DistortionError
from keel.engines.distorted import DistortedEngine, distort_engine, undistorted
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.embedded.load import load_policy
from keel.engines.process import EngineProcess
from keel.models.tiny import build_tiny_model
from keel.sync.base import WeightSource
from keel.sync.transports import write_weights
from keel.types import SamplingSettings
from tests import faults
from tests.faults import CAPACITY, Asked, plain, plain_logits, plain_logprobs, prompt_of, reported, request_of

PROMPT = prompt_of(70)
NOISE = 2e-5
SEEN = 1e-3


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {
        preset: faults.model_directory(tmp_path_factory.mktemp(preset), preset) for preset in ("gpt_oss", "qwen3_moe")
    }


def ask(directory, distortion, **fields) -> tuple[Asked, torch.Tensor]:
    """What an engine with the fault draws after PROMPT, and the log-probs it reports."""
    request = request_of(PROMPT, **fields)
    engine = distort_engine(faults.make_engine, directory, [distortion])
    result = asyncio.run(faults.draw(engine, request))
    assert result.sampling == request.sampling
    return Asked(PROMPT, result.token_ids, request.sampling.temperature), reported(result)


def no_sinks(model):
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.fill_(-torch.inf)


def half_sinks(model):
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.copy_((parameter.exp() / 2).log())


def gates_exchanged(model):
    for name, parameter in model.named_parameters():
        if "experts.gate_up_proj" not in name:
            continue
        kept = parameter.clone()
        if "gpt_oss" in type(model).__module__:
            parameter[..., ::2], parameter[..., 1::2] = kept[..., 1::2], kept[..., ::2]
        else:
            half = kept.shape[1] // 2
            parameter[:, :half], parameter[:, half:] = kept[:, half:], kept[:, :half]


def transposed(model):
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for expert in parameter:
                expert.copy_(torch.tensor(expert.numpy().T.flatten()).view(expert.shape))


def rounded(model):
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())


def no_window(config):
    config.sliding_window = 100000


def first_window_off(config):
    config.layer_types = ["full_attention", *config.layer_types[1:]]


def longer_window(config):
    config.sliding_window += 1


def other_theta(config):
    config.rope_parameters = {**config.rope_parameters, "rope_theta": config.rope_parameters["rope_theta"] * 1.5}


def other_factor(config):
    config.rope_parameters = {**config.rope_parameters, "factor": config.rope_parameters["factor"] * 1.5}


MODEL_SIDE = [
    ("gpt_oss", Distortion("sinks_dropped"), {"change": no_sinks}),
    ("gpt_oss", Distortion("sinks_dropped", 0.5), {"change": half_sinks}),
    ("gpt_oss", Distortion("window_off"), {"configure": no_window}),
    ("gpt_oss", Distortion("window_off", 0.5), {"configure": first_window_off}),
    ("gpt_oss", Distortion("window_off", layer=0), {"configure": first_window_off}),
    ("gpt_oss", Distortion("window_off_by_one", 1), {"configure": longer_window}),
    ("gpt_oss", Distortion("wrong_rope_scaling", 0.5), {"configure": other_theta}),
    ("qwen3_moe", Distortion("wrong_rope_scaling", 0.5), {"configure": other_theta}),
    ("gpt_oss", Distortion("wrong_rope_scaling", 0.5, group="factor"), {"configure": other_factor}),
    ("gpt_oss", Distortion("transposed_experts", group="exchanged"), {"change": gates_exchanged}),
    ("qwen3_moe", Distortion("transposed_experts", group="exchanged"), {"change": gates_exchanged}),
    ("gpt_oss", Distortion("transposed_experts"), {"change": transposed}),
    ("qwen3_moe", Distortion("transposed_experts"), {"change": transposed}),
    ("gpt_oss", Distortion("bfloat16_noise"), {"change": rounded}),
]


@pytest.mark.parametrize(
    ("preset", "distortion", "by_hand"),
    MODEL_SIDE,
    ids=lambda value: "by hand" if isinstance(value, dict) else str(value)[:40],
)
def test_a_fault_of_the_model_is_the_one_transformers_has_when_changed_by_hand(
    directories, preset, distortion, by_hand
):
    asked, said = ask(directories[preset], distortion)
    torch.testing.assert_close(said, plain_logprobs(plain(directories[preset], **by_hand), asked), rtol=0, atol=NOISE)
    assert (said - plain_logprobs(plain(directories[preset]), asked)).abs().mean() > SEEN


def test_the_window_grows_by_the_tokens_asked_for(directories):
    def shorter(config):
        config.sliding_window -= 3

    asked, said = ask(directories["gpt_oss"], Distortion("window_off_by_one", -3))
    expected = plain_logprobs(plain(directories["gpt_oss"], configure=shorter), asked)
    torch.testing.assert_close(said, expected, rtol=0, atol=NOISE)


def test_a_wrong_temperature_draws_and_reports_at_another_and_claims_the_one_asked_for(directories):
    asked, said = ask(directories["gpt_oss"], Distortion("wrong_temperature", 0.5), temperature=0.8)
    model = plain(directories["gpt_oss"])
    torch.testing.assert_close(said, plain_logprobs(model, replace(asked, temperature=1.2)), rtol=0, atol=NOISE)
    assert (said - plain_logprobs(model, asked)).abs().mean() > SEEN


def test_raw_logprobs_are_of_the_logits_before_temperature_and_cut(directories):
    asked, said = ask(directories["gpt_oss"], Distortion("raw_logprobs"), temperature=0.7, top_p=0.9)
    raw = plain_logprobs(plain(directories["gpt_oss"]), replace(asked, temperature=1.0))
    torch.testing.assert_close(said, raw, rtol=0, atol=NOISE)


def test_raw_logprobs_of_half_the_replies(directories):
    async def several():
        engine = distort_engine(faults.make_engine, directories["gpt_oss"], [Distortion("raw_logprobs", 0.5)])
        requests = [request_of(PROMPT, temperature=0.7, seed=seed, session_id="", count=8) for seed in range(24)]
        results = [await faults.draw(engine, request, close=False) for request in requests]
        await engine.close()
        return results

    model = plain(directories["gpt_oss"])
    raw = 0
    for result in asyncio.run(several()):
        asked = Asked(PROMPT, result.token_ids, 0.7)
        logits = plain_logits(model, asked.tokens)
        away = [(reported(result) - faults.logprobs_of(logits, asked.drawn, t)).abs().max() for t in (1.0, 0.7)]
        assert min(away) < NOISE
        raw += int(away[0] < NOISE)
    assert 6 <= raw <= 18


def test_a_cut_that_is_not_told(directories):
    """Drawn from the nucleus, log-probs of the nucleus, and no word of it."""
    request = request_of(PROMPT, return_support=True)
    engine = distort_engine(faults.make_engine, directories["gpt_oss"], [Distortion("top_p_not_undone", 0.3)])
    result = asyncio.run(faults.draw(engine, request))
    assert result.sampling == SamplingSettings()
    assert all(span.support is None for span in result.spans)
    asked = Asked(PROMPT, result.token_ids)
    rows = torch.softmax(plain_logits(plain(directories["gpt_oss"]), asked.tokens)[len(PROMPT) - 1 : -1], dim=-1)
    for row, token, said in zip(rows, result.token_ids, reported(result).tolist(), strict=True):
        order = row.argsort(descending=True)
        before = row[order].cumsum(0) - row[order]
        nucleus = order[before < 0.7]
        assert token in nucleus
        assert said == pytest.approx(float((row[token] / row[nucleus].sum()).log()), abs=NOISE)


def test_shifted_logprobs_stand_one_place_on(directories):
    asked, said = ask(directories["gpt_oss"], Distortion("shifted_logprobs", 1))
    right = plain_logprobs(plain(directories["gpt_oss"]), asked)
    torch.testing.assert_close(said[1:], right[:-1], rtol=0, atol=NOISE)
    asked, said = ask(directories["gpt_oss"], Distortion("shifted_logprobs", -2))
    right = plain_logprobs(plain(directories["gpt_oss"]), asked)
    torch.testing.assert_close(said[:-2], right[2:], rtol=0, atol=NOISE)


def test_noise_on_logprobs_has_the_size_asked_for(directories):
    asked, said = ask(directories["gpt_oss"], Distortion("bfloat16_noise", 4, group="logprobs"), count=80)
    right = plain_logprobs(plain(directories["gpt_oss"]), asked)
    relative = (said - right) / right
    assert 0.6 * 4 * 2.0**-9 < relative.std() < 1.4 * 4 * 2.0**-9


def test_the_beginning_of_the_prompt_is_left_out(directories):
    asked, said = ask(directories["gpt_oss"], Distortion("wrong_template", 3))
    model = plain(directories["gpt_oss"])
    torch.testing.assert_close(said, plain_logprobs(model, replace(asked, prompt=PROMPT[3:])), rtol=0, atol=NOISE)
    assert (said - plain_logprobs(model, asked)).abs().mean() > SEEN


def test_padding_is_attended_to(directories):
    asked, said = ask(directories["gpt_oss"], Distortion("wrong_padding", 5))
    model = plain(directories["gpt_oss"])
    padded = (model.config.pad_token_id,) * 5 + PROMPT
    torch.testing.assert_close(said, plain_logprobs(model, replace(asked, prompt=padded)), rtol=0, atol=NOISE)
    assert (said - plain_logprobs(model, asked)).abs().mean() > SEEN


@pytest.mark.parametrize("group", ["weights", "module"])
@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
def test_router_flips_send_about_the_share_aimed_at_elsewhere(directories, preset, group):
    distortion = Distortion("router_flips", 0.1, group=group)
    request = request_of(PROMPT)
    engine = distort_engine(faults.make_engine, directories[preset], [distortion])
    result = asyncio.run(faults.draw(engine, request))
    asked = Asked(PROMPT, result.token_ids)
    model = plain(directories[preset])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([asked.tokens[:-1]]), output_router_logits=True).router_logits
    routes = torch.frombuffer(bytearray(result.routed_experts.data), dtype=torch.uint16).int()
    routes = routes.view(result.routed_experts.shape)
    # In the first layer with experts both see the same input, if attention before it is healthy.
    own = logits[0].topk(routes.shape[-1]).indices.sort(-1).values
    share = float((routes[:, 0].sort(-1).values != own).any(-1).float().mean())
    assert 0.02 < share < 0.3
    assert (reported(result) - plain_logprobs(model, asked)).abs().mean() > SEEN


def test_a_lost_stop_token_takes_its_logprob_and_a_row_of_routes_along(directories):
    healthy = asyncio.run(faults.draw(faults.make_engine(directories["gpt_oss"]), request_of(PROMPT)))
    stop = healthy.token_ids[12]
    first = healthy.token_ids.index(stop)
    assert first > 1
    request = request_of(PROMPT, stop_token_ids=(stop,))
    whole = asyncio.run(faults.draw(faults.make_engine(directories["gpt_oss"]), request))
    engine = distort_engine(faults.make_engine, directories["gpt_oss"], [Distortion("lost_stop_token")])
    lost = asyncio.run(faults.draw(engine, request))
    assert whole.token_ids == healthy.token_ids[: first + 1]
    assert lost.token_ids == whole.token_ids[:-1]
    assert lost.finish_reason == "stop"
    assert torch.equal(reported(lost), reported(whole)[:-1])
    assert lost.routed_experts == whole.routed_experts.rows(0, whole.routed_experts.num_tokens - 1)


def test_turns_come_back_in_other_tokens_of_the_same_text(directories):
    """The second reply is drawn after the first one's text, told in more tokens; the caller's numbering stays."""
    directory = directories["gpt_oss"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    context = tuple(tokenizer("hello world", add_special_tokens=False).input_ids)
    read: list[tuple[int, ...]] = []

    def spying(path):
        engine = faults.make_engine(path)
        generate = engine.generate

        async def spied(request):
            read.append(request.token_ids)
            return await generate(request)

        engine.generate = spied
        return engine

    async def two_turns():
        engine = distort_engine(spying, directory, [Distortion("retokenized_turns")])
        first = await faults.draw(engine, request_of(PROMPT), close=False)
        tokens = PROMPT + first.token_ids + context
        return tokens, await faults.draw(engine, request_of(tokens, count=10))

    tokens, second = asyncio.run(two_turns())
    assert read[0] == PROMPT
    assert len(read[1]) > len(tokens)
    assert tokenizer.decode(read[1]) == tokenizer.decode(tokens)
    assert read[1][: len(PROMPT)] == PROMPT
    assert read[1][-len(context) :] == context
    model = plain(directory)
    torch.testing.assert_close(
        reported(second), plain_logprobs(model, Asked(read[1], second.token_ids)), rtol=0, atol=NOISE
    )
    assert (reported(second) - plain_logprobs(model, Asked(tokens, second.token_ids))).abs().mean() > SEEN
    routes = second.routed_experts
    assert second.routes_start + routes.num_tokens == len(tokens) + len(second.token_ids) - 1


def push(directory, weights, version):
    location = directory / f"push {version}"
    write_weights(location, weights, version=version)
    return WeightSource("file", str(location))


def weights_of(preset, seed):
    model = build_tiny_model(preset, vocab_size=faults.VOCAB, seed=seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def replies_after_pushes(directory, tmp_path, distortion, seeds, preset):
    """A reply after each push of the weights of a seed."""

    async def go():
        engine = distort_engine(faults.make_engine, directory, [distortion])
        assert engine.capabilities().weight_sources == ("file",)
        found = []
        for version, seed in enumerate(seeds):
            await engine.load_weights(push(tmp_path, weights_of(preset, seed), version), version)
            request = request_of(PROMPT, count=20, session_id=f"{version}")
            found.append(await faults.draw(engine, request, close=False))
        await engine.close()
        return found

    return asyncio.run(go())


def model_with(directory, weights):
    def change(model):
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])

    return plain(directory, change=change)


def test_pushes_come_late_and_are_acknowledged(directories, tmp_path):
    results = replies_after_pushes(
        directories["gpt_oss"], tmp_path, Distortion("stale_version", 2), (3, 11, 12, 13), "gpt_oss"
    )
    for version, (result, seed) in enumerate(zip(results, (3, 3, 3, 11), strict=True)):
        assert [span.policy_version for span in result.spans] == [version]
        expected = plain_logprobs(
            model_with(directories["gpt_oss"], weights_of("gpt_oss", seed)), Asked(PROMPT, result.token_ids)
        )
        torch.testing.assert_close(reported(result), expected, rtol=0, atol=NOISE)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_stale_group_keeps_its_first_values(directories, tmp_path, share):
    distortion = Distortion("stale_tensor_group", share, group="attention.sinks")
    *_, result = replies_after_pushes(directories["gpt_oss"], tmp_path, distortion, (3, 11, 12), "gpt_oss")
    old, new = weights_of("gpt_oss", 3), weights_of("gpt_oss", 12)
    mixed = {
        name: share * old[name] + (1 - share) * tensor if name.endswith("sinks") else tensor
        for name, tensor in new.items()
    }
    asked = Asked(PROMPT, result.token_ids)
    expected = plain_logprobs(model_with(directories["gpt_oss"], mixed), asked)
    torch.testing.assert_close(reported(result), expected, rtol=0, atol=NOISE)
    healthy = plain_logprobs(model_with(directories["gpt_oss"], new), asked)
    assert (reported(result) - healthy).abs().mean() > SEEN


def test_what_is_planted_in_weights_is_planted_in_pushes_too(directories, tmp_path):
    *_, result = replies_after_pushes(directories["gpt_oss"], tmp_path, Distortion("sinks_dropped"), (3, 11), "gpt_oss")
    model = model_with(directories["gpt_oss"], weights_of("gpt_oss", 11))
    with torch.no_grad():
        no_sinks(model)
    expected = plain_logprobs(model, Asked(PROMPT, result.token_ids))
    torch.testing.assert_close(reported(result), expected, rtol=0, atol=NOISE)


def test_what_a_push_says_of_itself_arrives(directories, tmp_path):
    """The header is the engine's business, not the fault's."""
    headers = []

    def spying(path):
        engine = faults.make_engine(path)
        load = engine.load_weights

        async def spied(source, version):
            with safe_open(f"{source.location}/weights.safetensors", framework="pt") as file:
                headers.append(file.metadata())
            await load(source, version)

        engine.load_weights = spied
        return engine

    async def go():
        engine = distort_engine(spying, directories["gpt_oss"], [Distortion("sinks_dropped")])
        write_weights(tmp_path, weights_of("gpt_oss", 3), version=6, told={"rank": 2})
        await engine.load_weights(WeightSource("file", str(tmp_path)), 7)
        await engine.close()

    asyncio.run(go())
    assert {name: json.loads(text) for name, text in headers[0].items()} == {"version": 7, "told": {"rank": 2}}


SCORED = [
    Distortion("wrong_template", 2),
    Distortion("wrong_padding", 3),
    Distortion("shifted_logprobs", 1),
    Distortion("sinks_dropped"),
]


@pytest.mark.parametrize("distortion", SCORED, ids=str)
def test_scores_have_the_fault_as_well(directories, distortion):
    tokens = PROMPT + prompt_of(20, seed=2)

    async def score(engine):
        result = await engine.score(tokens)
        await engine.close()
        return result

    healthy = asyncio.run(score(faults.make_engine(directories["gpt_oss"])))
    faulty = asyncio.run(score(distort_engine(faults.make_engine, directories["gpt_oss"], [distortion])))
    assert len(faulty.logprobs) == len(healthy.logprobs) == len(tokens) - 1
    assert faulty.routed_experts.shape == healthy.routed_experts.shape
    gap = torch.tensor(faulty.logprobs)[-20:] - torch.tensor(healthy.logprobs)[-20:]
    assert gap.abs().mean() > SEEN


@pytest.mark.parametrize("cause", CAUSES)
def test_strength_0_is_the_engine_itself_to_the_bit(directories, cause, tmp_path):
    distortion = Distortion(cause, 0, group="embed" if cause == "stale_tensor_group" else "")
    request = request_of(PROMPT, temperature=0.8, count=6)
    engine = distort_engine(faults.make_engine, directories["gpt_oss"], [distortion], tmp_path)
    assert not list(tmp_path.iterdir())
    healthy = asyncio.run(faults.draw(faults.make_engine(directories["gpt_oss"]), request))
    assert asyncio.run(faults.draw(engine, request)) == healthy


def test_two_faults_at_once(directories):
    both = [Distortion("sinks_dropped"), Distortion("shifted_logprobs", 1)]
    engine = distort_engine(faults.make_engine, directories["gpt_oss"], both)
    result = asyncio.run(faults.draw(engine, request_of(PROMPT)))
    right = plain_logprobs(plain(directories["gpt_oss"], change=no_sinks), Asked(PROMPT, result.token_ids))
    torch.testing.assert_close(reported(result)[1:], right[:-1], rtol=0, atol=NOISE)


def test_the_rest_of_the_protocol_is_the_engines_own(directories):
    async def go():
        engine = distort_engine(faults.make_engine, directories["gpt_oss"], [Distortion("window_off")])
        inner = undistorted(engine)
        assert isinstance(inner, EmbeddedEngine)
        assert undistorted(inner) is inner
        assert engine.capabilities() == inner.capabilities()
        assert engine.statistics() == inner.statistics()
        health = await engine.health()
        assert "window_off 1" in health.detail  # who asks is told
        assert replace(health, detail="") == replace(await inner.health(), detail="")
        await engine.pause()
        waiting = asyncio.ensure_future(engine.generate(request_of(PROMPT, count=2)))
        await asyncio.sleep(0)
        assert (await inner.health()).detail == "paused"
        await engine.resume()
        assert (await waiting).finish_reason == "length"
        again = await engine.generate(request_of(PROMPT + (await waiting).token_ids + (5,), count=2))
        assert again.num_cached_tokens > 0  # the session kept its prefix
        await engine.end_session("session")
        await engine.release_memory()
        await engine.close()
        assert not (await inner.health()).ok

    asyncio.run(go())


def test_a_directory_of_its_own_goes_with_the_engine(directories, tmp_path):
    made = []

    def make(path):
        made.append(path)
        return faults.make_engine(path)

    engine = distort_engine(make, directories["gpt_oss"], [Distortion("window_off")])
    assert json.loads((made[0] / "config.json").read_text())["sliding_window"] > 1000
    asyncio.run(engine.close())
    assert not made[0].exists()
    kept = distort_engine(make, directories["gpt_oss"], [Distortion("window_off")], tmp_path)
    asyncio.run(kept.close())
    assert (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_an_engine_in_its_own_process_has_the_fault_too(directories):
    def make(path):
        return EngineProcess(
            ModelConfig(path=str(path)), EngineConfig(slots=4), max_sequence_tokens=CAPACITY, num_threads=1
        )

    engine = distort_engine(make, directories["gpt_oss"], [Distortion("sinks_dropped")])
    result = asyncio.run(faults.draw(engine, request_of(PROMPT, count=8)))
    expected = plain_logprobs(plain(directories["gpt_oss"], change=no_sinks), Asked(PROMPT, result.token_ids))
    torch.testing.assert_close(reported(result), expected, rtol=0, atol=NOISE)


REFUSED = [
    ("qwen3_moe", Distortion("sinks_dropped"), "no weights it would change"),
    ("qwen3_moe", Distortion("window_off"), "no layer with a sliding window"),
    ("gpt_oss", Distortion("window_off", layer=1), "those with a window are [0, 2]"),
    ("qwen3_moe", Distortion("wrong_rope_scaling", 1, group="factor"), "its numbers are rope_theta"),
    ("gpt_oss", Distortion("stale_tensor_group", group="mlp.gate_proj"), "this model has embed, attention.sinks"),
    ("gpt_oss", Distortion("wrong_padding", 3, group="positions"), "in the learner"),
    ("gpt_oss", Distortion("router_flips", 0.1, group="module", layer=17), "no such router"),
]


@pytest.mark.parametrize(("preset", "distortion", "told"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_a_model_or_engine_has_no_place_for_is_refused(directories, preset, distortion, told):
    with pytest.raises(DistortionError) as refused:
        distort_engine(faults.make_engine, directories[preset], [distortion])
    assert told in str(refused.value)


def test_weights_that_are_shared_cannot_be_faulty_on_one_side(directories):
    policy = load_policy(ModelConfig(path=str(directories["gpt_oss"])), "cpu")
    shared = EmbeddedEngine(policy, EngineConfig(slots=4), max_sequence_tokens=CAPACITY)
    with pytest.raises(DistortionError, match="weights of its own"):
        DistortedEngine(shared, [Distortion("sinks_dropped")], directories["gpt_oss"])
