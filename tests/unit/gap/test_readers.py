"""Logs of others, in exactly their formats (the readers name the sources), read, refused and told of in words.

The samples were once compared with what the trainers' own writers make of the same values.
"""

from __future__ import annotations

import enum
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch

import keel
from keel.gap.log import GapLogError
from keel.gap.measure import measure
from keel.gap.read import read_any

DRAW = np.random.default_rng(3)


def logprobs(n):
    return (-DRAW.random(n)).astype(np.float32).astype(float).tolist()


# --- prime-rl


def export_line(**changes):
    """A line of rank_0.jsonl: prompt of 4 tokens, then 3 drawn, 2 of the world, 3 drawn."""
    mask = [False] * 4 + [True] * 3 + [False] * 2 + [True] * 3
    engine = [value if drawn else 0.0 for value, drawn in zip(logprobs(12), mask, strict=True)]
    trainer = [value - 0.25 for value in engine]
    line = {
        "schema_version": 1, "step": 7, "rank": 0, "micro_step": 0, "micro_sequence_idx": 0, "export_sequence_idx": 0,
        "env_name": "reverse-text", "token_ids": list(range(10, 22)),
        "position_ids": list(range(12)), "loss_mask": mask,
        "advantages": [1.0] * 12, "inference_logprobs": engine, "trainer_logprobs": trainer, "entropy": [0.5] * 12,
        "mismatch_kl": [math.exp(-0.25) + 0.25 - 1] * 12, "log_importance_ratio": [-0.25] * 12,
        "importance_ratio": [math.exp(-0.25)] * 12, "prob_delta": [0.0] * 12, "is_masked": [False] * 12,
        "is_masked_high": [False] * 12, "is_masked_low": [False] * 12, "rl_weights": [None] * 12,
        "ce_weights": [None] * 12, "ref_kl_weights": [None] * 12,
    }  # fmt: skip
    return {**line, **changes}


def write_export(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return path


def test_token_exports_of_prime_rl(tmp_path):
    root = tmp_path / "token_exports"
    write_export(root / "step_7" / "rank_0.jsonl", export_line(), export_line())
    write_export(root / "step_7" / "rank_1.jsonl", export_line())
    (root / "step_7" / "STABLE").touch()
    report = keel.mismatch(root)
    assert (report.kind, report.num_sequences, report.num_tokens) == ("prime-rl token export", 3, 18)
    assert report.statistics["abs_mean"] == pytest.approx(0.25)
    assert report.statistics["k1"] == pytest.approx(0.25)  # the trainer finds them less likely
    assert report.peers["mismatch_kl"] == pytest.approx(export_line()["mismatch_kl"][0])
    (sequence,) = read_any(root / "step_7" / "rank_1.jsonl").sequences
    assert sequence.token_ids[sequence.drawn].tolist() == [14, 15, 16, 19, 20, 21]


def test_tokens_of_other_models_are_not_compared(tmp_path):
    """A ce component's tokens have no sampling log-probs that mean anything; those distilled on policy have."""
    weights = [0.0] * 9 + [1.0] * 3
    file = write_export(tmp_path / "rank_0.jsonl", export_line(rl_weights=weights))
    assert int(read_any(file).sequences[0].drawn.sum()) == 3
    file = write_export(
        tmp_path / "rank_0.jsonl", export_line(rl_weights=weights, ref_kl_weights=[1.0] * 5 + [0.0] * 7)
    )
    assert int(read_any(file).sequences[0].drawn.sum()) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "schema_version is 2"),
        ({"trainer_logprobs": [-1.0] * 11}, "learner_logprobs has 11 entries for 12 tokens"),
        ({"trainer_logprobs": [-1.0] * 5 + [None] * 7}, "learner_logprobs of token 5 is nan"),
        ({"inference_logprobs": [0.5] * 12}, "rollout_logprobs of token 4 is 0.5"),
        ({"token_ids": ["x"] * 12}, "token_ids is no list of numbers"),
        ({"loss_mask": None}, "loss_mask is no list of numbers"),
        ({"rl_weights": [1.0] * 3}, "rl_weights has 3 entries"),
    ],
)
def test_a_wrong_export_is_refused_by_line_and_field(tmp_path, change, said):
    file = write_export(tmp_path / "rank_0.jsonl", export_line(), export_line(**change))
    with pytest.raises(GapLogError, match=said) as told:
        read_any(file)
    assert f"{file}, line 2" in str(told.value)


def test_null_where_nothing_was_drawn_is_no_fault(tmp_path):
    trainer = export_line()["trainer_logprobs"]
    trainer[0] = None
    assert keel.mismatch(write_export(tmp_path / "rank_0.jsonl", export_line(trainer_logprobs=trainer))).num_tokens == 6


def test_a_torn_export_is_refused(tmp_path):
    file = write_export(tmp_path / "rank_0.jsonl", export_line(), export_line())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(GapLogError, match=r"rank_0.jsonl, line 2: no JSON .* torn"):
        read_any(file)


# --- slime and miles


def sample(index, **changes):
    """`Sample.to_dict()`: 3 tokens of prompt, 4 of response of which the third is the world's."""
    made = {
        "group_index": 0, "index": index, "rollout_id": None, "prompt": "What is 1+1?",
        "tokens": [index, 1, 2, 3, 4, 5, 6], "multimodal_inputs": None, "multimodal_train_inputs": None,
        "response": "xxxx", "response_length": 4, "label": None, "reward": 1.0, "loss_mask": [1, 1, 0, 1],
        "weight_versions": ["3"], "rollout_log_probs": [-0.5, -0.25, 0.0, -1.0], "rollout_routed_experts": None,
        "remove_sample": False, "teacher_log_probs": None, "status": "completed", "metadata": {"source": {"a": [1]}},
        "train_metadata": None, "non_generation_time": 0.0,
        "spec_info": {"spec_accept_token_num": 0}, "prefix_cache_info": {"cached_tokens": 0},
    }  # fmt: skip
    return {**made, **changes}


def slime_train(*indices, **changes):
    """A sample of slime's train dump, format 2: columns cut into rows keep their plural names."""
    return [
        {
            "data_parallel_rank": 0, "sample_index": index, "rollout_position": index, "rollout_ids": index,
            "tokens": torch.tensor(sample(index)["tokens"]), "response_lengths": 4, "total_lengths": 7,
            "loss_masks": torch.tensor([1, 1, 0, 1], dtype=torch.int),
            "rollout_log_probs": torch.tensor([-0.5, -0.25, 0.0, -1.0]),
            "log_probs": torch.tensor([-0.75, -0.25, -9.0, -1.0]), **changes,
        }
        for index in indices
    ]  # fmt: skip


def miles_rank(*indices, **changes):
    """A rank's train dump of miles: columns."""
    rows = slime_train(*indices)
    names = ("tokens", "response_lengths", "total_lengths", "loss_masks", "rollout_log_probs", "log_probs")
    columns = {name: [row[name] for row in rows] for name in names}
    data = {**columns, "sample_indices": list(indices), **changes}
    return {"rollout_id": 0, "rank": 0, "rollout_data": data, "cp_rank": 0, "cp_size": 1, "qkv_format": "thd"}


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


def test_debug_dumps_of_slime(tmp_path):
    save(tmp_path / "rollout_data" / "0.pt", {"rollout_id": 0, "samples": [sample(0), sample(1)]})
    save(tmp_path / "rollout_data" / "eval_0.pt", {"rollout_id": 0, "samples": [sample(9)]})
    train = {"format_version": 2, "rollout_id": 0, "rank": 0, "samples": slime_train(0, 1), "dp_shards": []}
    save(tmp_path / "train_data" / "0.pt", train)
    for given in (tmp_path, tmp_path / "train_data" / "0.pt"):
        report = keel.mismatch(given)
        assert (report.num_sequences, report.num_trajectories, report.num_tokens) == (2, 2, 6)
        assert report.statistics["abs_mean"] == pytest.approx(0.25 / 3)
        assert report.peers["train_rollout_logprob_abs_diff"] == pytest.approx(0.25 / 3)
        assert not report.notes


def test_debug_dumps_of_miles(tmp_path):
    """Two data-parallel ranks, each twice for two tensor-parallel ones, one of which lacks what is computed last."""
    for rank, indices in enumerate(((0, 1), (0, 1), (2, 3), (2, 3))):
        dump = miles_rank(*indices)
        if rank == 2:
            del dump["rollout_data"]["log_probs"]
        save(tmp_path / "train_data" / f"0_{rank}.pt", dump)
    routed = sample(1, rollout_routed_experts=np.zeros((6, 2, 2), dtype=np.int32), adapter=None, reward=np.float64(1.0))
    save(tmp_path / "rollout_data" / "0.pt", {"rollout_id": 0, "metadata": {}, "samples": [sample(0), routed]})
    report = keel.mismatch(tmp_path)
    assert (report.num_sequences, report.num_tokens) == (4, 12)
    assert report.statistics["abs_max"] == pytest.approx(0.25)


def test_the_same_sample_of_two_steps_is_two(tmp_path):
    files = []
    for step in (0, 1):
        dump = {"format_version": 2, "rollout_id": step, "samples": slime_train(0)}
        files.append(save(tmp_path / f"{step}.pt", dump))
    assert keel.mismatch(files).num_sequences == 2


def test_a_rollout_dump_alone_lacks_a_side_and_says_which_and_how_to_have_it(tmp_path):
    file = save(tmp_path / "0.pt", {"rollout_id": 0, "samples": [sample(0)]})
    with pytest.raises(GapLogError) as told:
        keel.mismatch(file)
    for part in (str(file), "lack the learner's log-probs", "--save-debug-train-data", "--model"):
        assert part in str(told.value)


def test_siblings_of_one_rollout_count_once_in_the_peers_mean(tmp_path):
    rows = [*slime_train(0), *slime_train(1, log_probs=torch.tensor([-0.5, -0.25, 0.0, -1.0]))]
    for row in rows:
        row["rollout_ids"] = 5
    rows += slime_train(2, log_probs=torch.tensor([-1.5, -1.25, 0.0, -2.0]))
    report = keel.mismatch(save(tmp_path / "0.pt", {"format_version": 2, "rollout_id": 0, "samples": rows}))
    assert report.num_trajectories == 2
    assert report.peers["train_rollout_logprob_abs_diff"] == pytest.approx((0.25 / 6 + 1.0) / 2)


class Harmful:
    """What a pickle may do on being read."""

    def __reduce__(self):
        return (print, ("this must not run",))


class Status(enum.Enum):
    DONE = "done"


@pytest.mark.parametrize("foreign", [Harmful(), Status.DONE, SimpleNamespace(a=1)])
def test_a_dump_that_needs_code_is_refused_and_not_run(tmp_path, capsys, foreign):
    file = save(tmp_path / "0.pt", {"rollout_id": 0, "samples": [sample(0, metadata={"x": foreign})]})
    with pytest.raises(GapLogError, match="would run code that the file names") as told:
        read_any(file)
    assert str(file) in str(told.value)
    assert "\x1b" not in str(told.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"samples": [sample(0, rollout_log_probs=[-1.0] * 3)]}, "rollout_log_probs has 3 entries, 4 tokens need one"),
        ({"samples": [sample(0, loss_mask=[1] * 5)]}, "loss_mask has 5 entries"),
        ({"samples": [sample(0, response_length=9)]}, "response_length is 9 of 7 tokens"),
        ({"samples": [sample(0, rollout_log_probs=[-1.0, math.nan, 0.0, -1.0])]}, "rollout_logprobs of token 4 is nan"),
        ({"samples": [{"tokens": [1]}]}, "has no response_length"),
        ({"samples": [{"index": 1}]}, "has no tokens"),
        ({"samples": [3]}, "is int, not a sample"),
        ({"samples": 3}, "samples is int, not a list"),
        ({"format_version": 3, "samples": []}, "format_version is 3"),
        ({"model": torch.zeros(2)}, "not a dump of slime or miles"),
        ([1, 2], "not a dump of slime or miles"),
        ({"rollout_data": {"tokens": []}}, "not a train dump of miles"),
        ({**miles_rank(0), "cp_size": 2}, "cp_size is 2"),
        (miles_rank(0, 1, log_probs=[torch.zeros(4)]), "log_probs has 1 entries for 2 samples"),
    ],
)
def test_a_wrong_dump_is_refused_by_file_and_field(tmp_path, value, said):
    file = save(tmp_path / "0.pt", value)
    with pytest.raises(GapLogError, match=said) as told:
        read_any(file)
    assert str(file) in str(told.value)


def test_a_torn_dump_is_refused(tmp_path):
    file = save(tmp_path / "0.pt", {"rollout_id": 0, "samples": [sample(0)]})
    whole = file.read_bytes()
    for end in (1, 100, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:end])
        with pytest.raises(GapLogError, match="torn, or not a file of torch's"):
            read_any(file)


def test_samples_that_were_given_up_are_left_out(tmp_path):
    empty = sample(1, tokens=[], response_length=0, rollout_log_probs=None, loss_mask=None, status="aborted")
    removed = {**slime_train(2)[0], "remove_sample": True}
    value = {"format_version": 2, "rollout_id": 0, "samples": [*slime_train(0), empty, removed]}
    assert keel.mismatch(save(tmp_path / "0.pt", value)).num_sequences == 1


# --- arrays


def arrays():
    return {
        "token_ids": np.arange(7),
        "drawn": np.array([0, 1, 1, 0, 1, 1, 1], dtype=bool),
        "rollout_logprobs": np.array([0, -1, -2, 0, -1, -1, -1.0]),
        "learner_logprobs": np.array([0, -1.5, -2, 0, -1, -1, -1.0]),
        "cu_seqlens": np.array([0, 3, 7]),
    }


def as_tensors(value):
    return {name: torch.from_numpy(each) for name, each in value.items()}


def as_lists(value):
    bounds = value["cu_seqlens"]
    rows = {name: each.tolist() for name, each in value.items() if name != "cu_seqlens"}
    return {name: [each[a:b] for a, b in pairwise(bounds)] for name, each in rows.items()}


@pytest.mark.parametrize("form", ["flat", "tensors", "lists", "npz", "json", "pt", "safetensors", "directory", "log"])
def test_arrays_in_every_form(tmp_path, form):
    flat = arrays()
    given = {"flat": flat, "tensors": as_tensors(flat), "lists": as_lists(flat)}.get(form)
    if form in ("npz", "directory"):
        given = tmp_path / "a.npz"
        np.savez(given, **flat)
        given = tmp_path if form == "directory" else str(given)
    if form == "json":
        given = tmp_path / "a.json"
        given.write_text(json.dumps(as_lists(flat)))
    if form == "pt":
        given = save(tmp_path / "a.pt", as_tensors(flat))
    if form == "safetensors":
        given = tmp_path / "a.safetensors"
        given.write_bytes(safetensors.numpy.save(flat))
    report = measure(read_any(flat)) if form == "log" else keel.mismatch(given)
    assert (report.kind, report.num_sequences, report.num_tokens) == ("arrays", 2, 5)
    assert report.statistics["abs_mean"] == pytest.approx(0.1)
    assert [(each.position, each.token_id, each.gap) for each in report.worst[:1]] == [(1, 1, -0.5)]


def test_padded_arrays_and_the_names_that_others_use():
    value = {
        "sampling_per_token_logps": torch.tensor([[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]]),
        "old_per_token_logps": torch.tensor([[-1.0, -2.5, 9.0], [-1.0, 9.0, 9.0]]),
        "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    report = keel.mismatch(value)
    assert (report.num_sequences, report.num_tokens) == (2, 3)
    assert report.statistics["abs_max"] == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"drawn": None, "rollout_logprobs": np.full(7, 0.7)}, "rollout_logprobs of token 0 is 0.7.*probabilities"),
        ({"learner_logprobs": np.zeros(6)}, "cu_seqlens .* does not cover"),
        ({"cu_seqlens": None, "learner_logprobs": np.zeros(6)}, "learner_logprobs has 6 entries for 7 tokens"),
        ({"cu_seqlens": np.array([0, 5, 3, 7])}, "does not cover"),
        ({"rollout_logprobs": None, "learner_logprobs": None}, "has neither rollout_logprobs nor learner_logprobs"),
        ({"rollout_logprobs": None}, "lack the engine's log-probs"),
        ({"learner_logprobs": None}, "lack the learner's log-probs.*--model"),
        ({"drawn": np.zeros(7)}, "no token that the policy drew"),
        ({"old_logprobs": np.zeros(7)}, "learner_logprobs and old_logprobs both mean learner_logprobs"),
        ({"learner_logprobs": np.array(["a"] * 7)}, "no list of numbers"),
        ({"token_ids": np.linspace(0, 1, 7)}, "token_ids holds what is no whole number"),
        ({"learner_logprobs": np.zeros((7, 2))}, "two dimensions"),
    ],
)
def test_wrong_arrays_are_refused_by_field(change, said):
    value = {name: each for name, each in {**arrays(), **change}.items() if each is not None}
    with pytest.raises(GapLogError, match=said):
        keel.mismatch(value)


def test_a_sequence_that_lacks_a_side_beside_whole_ones_is_told_of(tmp_path):
    half = arrays()
    del half["learner_logprobs"]
    report = keel.mismatch([arrays(), half])
    assert report.num_tokens == 5
    assert report.notes == ("2 of 4 sequences lack the learner's log-probs and are left out",)


# --- anything else


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.npz", "a.pt", "a.safetensors", "a.jsonl", "rank_0.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\x1b[31m", b'{"a": 1}\n', b"[]\n", b"PK\x03\x04 torn"])
def test_what_is_no_log_is_refused_in_words(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(GapLogError) as told:
        keel.mismatch(file)
    assert str(file) in str(told.value)


def test_what_is_not_there_or_holds_nothing_is_refused(tmp_path):
    for given, said in ((tmp_path / "none", "no such file"), (tmp_path, "no log of the gap"), (3, "cannot read int")):
        with pytest.raises(GapLogError, match=said):
            keel.mismatch(given)
    with pytest.raises(GapLogError, match="no log was given"):
        keel.mismatch([])
