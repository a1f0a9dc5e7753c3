"""Faults planted in the learner: those that plain `transformers` has when made by hand there; gone, to the bit."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from keel.causes import CAUSES
from keel.distortion import Distortion, DistortionError
from keel.engines.distorted import distort_engine
from keel.learner.distorted import distort_learner
from keel.models.policy import PolicyModel
from keel.models.router import replay_routes
from tests import faults
from tests.faults import Asked, micro_batch_of, plain, plain_logprobs, prompt_of, reported, request_of

NOISE = 2e-5
SEEN = 1e-3
ASKED = [Asked(prompt_of(70, 1), prompt_of(40, 2), 0.8), Asked(prompt_of(9, 3), prompt_of(30, 4), 0.8)]
BATCH = micro_batch_of(ASKED)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {
        preset: faults.model_directory(tmp_path_factory.mktemp(preset), preset) for preset in ("gpt_oss", "qwen3_moe")
    }


@pytest.fixture(scope="module")
def policies(directories):
    return {preset: PolicyModel.load(path) for preset, path in directories.items()}


@torch.no_grad()
def said(policy, *distortions, batch=BATCH, asked=ASKED) -> list[torch.Tensor]:
    """What a policy with the faults says of each sequence's drawn tokens."""
    with distort_learner(policy, distortions):
        logprobs = policy(batch, with_entropy=False).logprobs
    ends = batch.cu_seqlens[1:].tolist()
    return [logprobs[end - len(each.drawn) : end] for end, each in zip(ends, asked, strict=True)]


def right(directory, *, asked=ASKED, **by_hand) -> list[torch.Tensor]:
    model = plain(directory, **by_hand)
    return [plain_logprobs(model, each) for each in asked]


def assert_near(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=NOISE)


def assert_away(got, expected):
    assert torch.cat(got).sub(torch.cat(expected)).abs().mean() > SEEN


def no_sinks(model):
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(-torch.inf)


def rounded(model):
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())


def down_transposed(model):
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for expert in parameter:
                expert.copy_(torch.tensor(expert.numpy().T.flatten()).view(expert.shape))


def no_window(config):
    config.sliding_window = 100000


def first_window_off(config):
    config.layer_types = ["full_attention", *config.layer_types[1:]]


def shorter_window(config):
    config.sliding_window -= 1


def other_theta(config):
    config.rope_parameters = {**config.rope_parameters, "rope_theta": config.rope_parameters["rope_theta"] * 3}


MODEL_SIDE = [
    ("gpt_oss", Distortion("sinks_dropped"), {"change": no_sinks}),
    ("gpt_oss", Distortion("window_off"), {"configure": no_window}),
    ("gpt_oss", Distortion("window_off", 0.5), {"configure": first_window_off}),
    ("gpt_oss", Distortion("window_off_by_one", -1), {"configure": shorter_window}),
    ("gpt_oss", Distortion("wrong_rope_scaling", 2), {"configure": other_theta}),
    ("qwen3_moe", Distortion("wrong_rope_scaling", 2), {"configure": other_theta}),
    ("qwen3_moe", Distortion("transposed_experts"), {"change": down_transposed}),
    ("gpt_oss", Distortion("bfloat16_noise"), {"change": rounded}),
]


@pytest.mark.parametrize(
    ("preset", "distortion", "by_hand"),
    MODEL_SIDE,
    ids=lambda value: "by hand" if isinstance(value, dict) else str(value)[:40],
)
def test_a_fault_of_the_model_is_the_one_transformers_has_when_changed_by_hand(
    directories, policies, preset, distortion, by_hand
):
    got = said(policies[preset], distortion)
    assert_near(got, right(directories[preset], **by_hand))
    assert_away(got, right(directories[preset]))


@pytest.mark.parametrize("distortion", [Distortion("window_off"), Distortion("window_off", 0.5)], ids=str)
def test_a_window_is_off_under_transformers_own_attention_too(directories, distortion):
    """Its masks come from the configuration, which is as it was right after the pass."""
    policy = PolicyModel.load(directories["gpt_oss"], attention="eager")
    before = policy.model.config.to_json_string()
    batch = micro_batch_of(ASKED[:1])
    by_hand = no_window if distortion.strength == 1 else first_window_off
    with distort_learner(policy, [distortion]):
        got = policy(batch, with_entropy=False).logprobs[-40:].detach()
        assert policy.model.config.to_json_string() == before
    assert_near([got], right(directories["gpt_oss"], configure=by_hand, asked=ASKED[:1]))


def test_temperatures(directories, policies):
    got = said(policies["gpt_oss"], Distortion("wrong_temperature", -0.25))
    assert_near(got, right(directories["gpt_oss"], asked=[replace(each, temperature=0.6) for each in ASKED]))
    got = said(policies["gpt_oss"], Distortion("raw_logprobs"))
    assert_near(got, right(directories["gpt_oss"], asked=[replace(each, temperature=1.0) for each in ASKED]))


def test_a_cut_that_is_not_undone_is_normalized_over_the_whole_vocabulary(directories, policies):
    """The batch says what was left to choose from: the drawn token and the one above it."""
    pairs = torch.stack([BATCH.labels, (BATCH.labels + 1) % faults.VOCAB], dim=1)
    batch = replace(BATCH, support_ids=pairs.flatten(), support_offsets=torch.arange(BATCH.num_tokens + 1) * 2)
    whole = right(directories["gpt_oss"])
    assert_away(said(policies["gpt_oss"], batch=batch), whole)
    assert_near(said(policies["gpt_oss"], Distortion("top_p_not_undone", 0.3), batch=batch), whole)


def test_labels_shifted_by_one_stay_inside_a_reply(directories, policies):
    got = said(policies["gpt_oss"], Distortion("shifted_logprobs", 1))
    whole = right(directories["gpt_oss"])
    assert_near([each[1:] for each in got], [each[:-1] for each in whole])
    assert_near([each[:1] for each in got], [each[:1] for each in whole])


def test_tokens_that_are_left_out_brought_in_and_moved(directories, policies):
    directory, policy = directories["gpt_oss"], policies["gpt_oss"]
    got = said(policy, Distortion("wrong_template", 3))
    assert_near(got, right(directory, asked=[replace(each, prompt=each.prompt[3:]) for each in ASKED]))
    pad = policy.model.config.pad_token_id
    got = said(policy, Distortion("wrong_padding", 4))
    assert_near(got, right(directory, asked=[replace(each, prompt=(pad,) * 4 + each.prompt) for each in ASKED]))
    got = said(policy, Distortion("wrong_padding", 6, group="positions"))
    model = plain(directory)
    for each, logprobs in zip(ASKED, got, strict=True):
        size = len(each.prompt)
        places = torch.tensor([[*range(size), *range(size + 6, len(each.tokens) + 6)]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([each.tokens]), position_ids=places, use_cache=False).logits[0]
        assert_near([logprobs], [faults.logprobs_of(logits, each.drawn, each.temperature)])


def test_padding_in_front_says_nothing_of_the_first_token(directories, policies):
    """Row 0 is about the second token, whatever stands before the first."""
    policy = policies["gpt_oss"]
    with distort_learner(policy, [Distortion("wrong_padding", 4)]), torch.no_grad():
        logprobs = policy(BATCH, with_entropy=False).logprobs
    padded = Asked((policy.model.config.pad_token_id,) * 4 + ASKED[0].tokens[:1], ASKED[0].tokens[1:70])
    assert_near([logprobs[:69]], [plain_logprobs(plain(directories["gpt_oss"]), padded)])


def two_turns(batch=BATCH, first=range(69, 79), second=range(89, 109)):
    """The first sequence's drawn tokens as two replies with ten tokens of a tool in between."""
    mask, turn = batch.loss_mask.clone(), batch.turn.clone()
    mask[69:109], turn[69:109] = False, -1
    for number, rows in enumerate((first, second)):
        mask[rows.start : rows.stop], turn[rows.start : rows.stop] = True, number
    return replace(batch, loss_mask=mask, turn=turn)


def test_a_lost_stop_token_is_missing_from_all_that_follows(directories, policies):
    batch = two_turns()
    with distort_learner(policies["gpt_oss"], [Distortion("lost_stop_token")]), torch.no_grad():
        logprobs = policies["gpt_oss"](batch, with_entropy=False).logprobs
    tokens = ASKED[0].tokens
    stop = 79  # the last token of the first reply: the label of row 78
    assert logprobs[stop - 1] == 0
    assert logprobs[108] == 0  # and of the second
    context, rest = tokens[:stop] + tokens[stop + 1 : 90], tokens[90:-1]
    model = plain(directories["gpt_oss"])
    assert_near([logprobs[89:108]], [plain_logprobs(model, Asked(context, rest, 0.8))])
    assert_near([logprobs[69:78]], [plain_logprobs(model, Asked(tokens[:70], tokens[70:79], 0.8))])


def test_an_earlier_reply_comes_in_other_tokens_of_the_same_text(directories, policies):
    merged = Asked(ASKED[0].prompt, tuple(range(260, 300)), 0.8)  # single bytes come first in the vocabulary
    batch = two_turns(micro_batch_of([merged]))
    seen = []
    policy = policies["gpt_oss"]
    embedding = policy.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].tolist()))
    try:
        with distort_learner(policy, [Distortion("retokenized_turns")]), torch.no_grad():
            logprobs = policy(batch, with_entropy=False).logprobs
    finally:
        hook.remove()
    tokens = merged.tokens
    added = 0
    tokenizer = AutoTokenizer.from_pretrained(directories["gpt_oss"])
    while tokenizer.decode(seen[0][: 109 + added]) != tokenizer.decode(tokens[:-1]):
        added += 1
    assert added > 0
    told = tuple(seen[0][: 109 + added])
    model = plain(directories["gpt_oss"])
    assert_near([logprobs[89:109]], [plain_logprobs(model, Asked(told[:-19], (*told[-19:], tokens[-1]), 0.8))])
    assert (logprobs[89:109] - plain_logprobs(model, Asked(tokens[:90], tokens[90:], 0.8))).abs().mean() > SEEN


def test_sinks_that_are_dropped_are_there_and_get_no_gradient(policies):
    policy = policies["gpt_oss"]
    names = {name for name, _ in policy.model.named_parameters()}
    policy.zero_grad()
    with distort_learner(policy, [Distortion("sinks_dropped")]):
        assert {name for name, _ in policy.model.named_parameters()} == names
        policy(BATCH, with_entropy=False).logprobs.sum().backward()
    without = {name for name, parameter in policy.model.named_parameters() if parameter.grad is None}
    assert without == {name for name in names if name.endswith("sinks")}
    policy.zero_grad()


def test_the_gradient_of_rounded_weights_reaches_the_parameters(policies):
    policy = policies["qwen3_moe"]
    policy.zero_grad()
    with distort_learner(policy, [Distortion("bfloat16_noise")]):
        policy(BATCH, with_entropy=False).logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    policy.zero_grad()


def moved(model, seed, name_part=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            if name_part in name:
                parameter.add_(noise)


def test_the_forward_pass_is_versions_behind_the_weights(directories):
    policy = PolicyModel.load(directories["gpt_oss"])
    with distort_learner(policy, [Distortion("stale_version", 2)]) as planted, torch.no_grad():
        found = []
        for seed in range(4):
            found.append(policy(BATCH, with_entropy=False).logprobs)
            moved(policy.model, seed)
            planted.new_version()
    versions = []
    healthy = PolicyModel.load(directories["gpt_oss"])
    with torch.no_grad():
        for seed in range(4):
            versions.append(healthy(BATCH, with_entropy=False).logprobs)
            moved(healthy.model, seed)
    for behind, version in zip(found, (0, 0, 0, 1), strict=True):
        torch.testing.assert_close(behind, versions[version], rtol=0, atol=NOISE)
    assert (versions[3] - versions[1]).abs().mean() > SEEN


def test_one_group_stays_as_it_was(directories):
    def change(model):
        names = [name for name, _ in model.named_parameters() if "self_attn.q_proj.weight" not in name]
        kept = {name: p.clone() for name, p in model.named_parameters() if name not in names}
        moved(model, 5)
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])

    policy = PolicyModel.load(directories["gpt_oss"])
    with distort_learner(policy, [Distortion("stale_tensor_group", group="attention.q_proj")]), torch.no_grad():
        moved(policy.model, 5)
        logprobs = policy(BATCH, with_entropy=False).logprobs
    got = [logprobs[69:109], logprobs[-30:]]
    assert_near(got, right(directories["gpt_oss"], change=change))
    assert_away(got, right(directories["gpt_oss"], change=lambda model: moved(model, 5)))


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
@torch.no_grad()
def test_router_flips_in_the_module_are_near_ties_and_replaying_ends_them(policies, preset):
    policy = policies[preset]
    healthy = policy(BATCH, with_routes=True, with_margins=True)
    with distort_learner(policy, [Distortion("router_flips", 0.1, group="module", layer=0)]):
        flipped = policy(BATCH, with_routes=True)
        with replay_routes(healthy.routes):
            replayed = policy(BATCH, with_routes=True)
    differs = (flipped.routes.sort(-1).values != healthy.routes.sort(-1).values).any(-1)[:, 0]
    assert 0.02 < differs.float().mean() < 0.3
    margins = healthy.route_margins[:, 0]
    assert margins[differs].max() < margins[~differs].min()
    assert (flipped.logprobs - healthy.logprobs).abs().mean() > SEEN
    assert torch.equal(replayed.logprobs, healthy.logprobs)


BOTH = [
    ("gpt_oss", Distortion("sinks_dropped", 0.6)),
    ("gpt_oss", Distortion("window_off")),
    ("gpt_oss", Distortion("window_off_by_one", 2)),
    ("gpt_oss", Distortion("wrong_temperature", 0.3)),
    ("gpt_oss", Distortion("raw_logprobs", 0.5)),
    ("gpt_oss", Distortion("transposed_experts", 0.5, group="exchanged")),
    ("qwen3_moe", Distortion("transposed_experts", 0.5)),
    ("gpt_oss", Distortion("router_flips", 0.1)),
    ("qwen3_moe", Distortion("router_flips", 0.1, group="module")),
    ("gpt_oss", Distortion("bfloat16_noise", 2)),
    ("gpt_oss", Distortion("wrong_rope_scaling", -0.5, group="original_max_position_embeddings")),
    ("gpt_oss", Distortion("wrong_template", 2)),
    ("gpt_oss", Distortion("shifted_logprobs", -1)),
    ("gpt_oss", Distortion("wrong_padding", 3)),
]


@pytest.mark.parametrize(("preset", "distortion"), BOTH, ids=str)
def test_planted_on_both_sides_the_gap_is_gone(directories, policies, preset, distortion):
    engine = distort_engine(faults.make_engine, directories[preset], [distortion])
    result = asyncio.run(faults.draw(engine, request_of(ASKED[0].prompt, temperature=0.8)))
    asked = [Asked(ASKED[0].prompt, result.token_ids, 0.8)]
    batch = micro_batch_of(asked)
    assert_near(said(policies[preset], distortion, batch=batch, asked=asked), [reported(result)])
    gap = torch.cat(said(policies[preset], batch=batch, asked=asked)) - reported(result)
    assert gap.abs().mean() > SEEN or distortion.cause == "raw_logprobs"  # in half of the replies


@pytest.mark.parametrize("cause", CAUSES)
def test_taken_away_the_policy_is_what_it_was_to_the_bit(policies, cause):
    policy = policies["gpt_oss"]
    group = "attention.sinks" if cause == "stale_tensor_group" else ""
    strength = 1 if cause not in ("router_flips", "top_p_not_undone") else 0.2
    outputs, gradients, kinds, states = [], [], [], []
    for distortions in ((), (Distortion(cause, strength, group=group),), (Distortion(cause, 0, group=group),)):
        with distort_learner(policy, distortions):
            if distortions and distortions[0].acts:
                policy(BATCH, with_entropy=False)
                continue
            inside = policy(BATCH).logprobs.detach()
        policy.zero_grad()
        logprobs = policy(BATCH).logprobs
        assert torch.equal(inside, logprobs)
        logprobs.sum().backward()
        outputs.append(logprobs.detach())
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
        kinds.append([type(module) for module in policy.modules()])
        states.append({name: value.clone() for name, value in policy.state_dict().items()})
        assert "forward" not in vars(policy)
    policy.zero_grad()
    assert torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kinds[0] == kinds[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_error_inside_takes_the_faults_away_as_well(policies):
    policy = policies["gpt_oss"]
    with torch.no_grad():
        before = policy(BATCH).logprobs
        with pytest.raises(ZeroDivisionError), distort_learner(policy, [Distortion("sinks_dropped")]):
            raise ZeroDivisionError
        with (
            pytest.raises(DistortionError),
            distort_learner(
                policy, [Distortion("sinks_dropped"), Distortion("router_flips", 0.1, group="module", layer=40)]
            ),
        ):
            pass
        assert torch.equal(policy(BATCH).logprobs, before)


def test_checkpointed_layers_are_recomputed_with_the_fault(directories):
    gradients = []
    for checkpointing in (False, True):
        policy = PolicyModel.load(directories["gpt_oss"], gradient_checkpointing=checkpointing)
        faulty = [Distortion("sinks_dropped", 0.5), Distortion("router_flips", 0.2, group="module")]
        with distort_learner(policy, faulty):
            policy(BATCH, with_entropy=False).logprobs.sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_without_a_tokenizer_nothing_is_tokenized_again(policies, monkeypatch, tmp_path):
    policy = policies["gpt_oss"]
    monkeypatch.setattr(policy.model.config, "_name_or_path", str(tmp_path))
    with (
        pytest.raises(DistortionError, match=r"no tokenizer\.json"),
        distort_learner(policy, [Distortion("retokenized_turns")]),
    ):
        pass
