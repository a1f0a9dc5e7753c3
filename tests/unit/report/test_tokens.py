"""The token view against what the packer and the recorder of real runs write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from keel.batch import pack
from keel.records import step_streams
from keel.report.episodes import RecordedStep, trajectory_json
from keel.report.tokens import TokenText, find_token_text, token_streams
from keel.runs import StepRecord, load_run
from keel.types import Group, SamplingSettings, Segment, Task, TokenSpan, Trajectory, Turn
from tests.report_runs import make_tokenizer

SAMPLING = SamplingSettings()


def context(*ids):
    return TokenSpan(ids, "context")


def drawn(*ids, version=7):
    return TokenSpan(ids, "policy", tuple(-0.5 - token / 100 for token in ids), version, SAMPLING)


def turn(segment, span):
    return Turn((), "", "stop", segment, span)


def make_step():
    """Two groups of two: a failed attempt, one of two segments, one with demonstrated tokens."""
    two_segments = Trajectory(
        Task("a"),
        "g0",
        1,
        (),
        (turn(0, 1), turn(1, 1)),
        (Segment((context(1, 2, 3), drawn(4, 5))), Segment((context(6, 7), drawn(8, 9, 10, version=8)))),
        "completed",
        reward=1.0,
    )
    spoilt = Trajectory(Task("a"), "g0", 0, (), (), (Segment((context(1, 2), drawn(3))),), "env_error")
    plain = Trajectory(
        Task("b"),
        "g1",
        0,
        (),
        (turn(0, 1), turn(0, 3)),
        (Segment((context(1, 2), drawn(3), context(4, 5), drawn(6, 7))),),
        "completed",
        reward=0.25,
    )
    shown = Trajectory(
        Task("b"),
        "g1",
        1,
        (),
        (turn(0, 1),),
        (Segment((context(1, 2), TokenSpan((3, 4), "demonstration"))),),
        "completed",
        reward=0.0,
    )
    trajectories = (spoilt, two_segments, plain, shown)
    batch = pack([Group("g0", Task("a"), trajectories[:2]), Group("g1", Task("b"), trajectories[2:])], max_tokens=16)
    rows = sum(micro.num_tokens for micro in batch.micro_batches)
    streams = step_streams(batch, ())
    # The learner's own: each row's place, so that a wrong shift shows.
    streams |= {"logprobs": -np.arange(rows, dtype=np.float32) / 100, "entropy": np.arange(rows, dtype=np.float32)}
    return RecordedStep(3, trajectories, StepRecord(Path("x"), streams, {"step": 3}))


def test_every_stream_stands_at_the_token_it_speaks_of():
    step = make_step()
    for index, trajectory in enumerate(step.trajectories):
        found = trajectory_json(step, index, None)["tokens"]
        if trajectory.failed:
            assert found is None
            continue
        spans = [(number, span) for number, segment in enumerate(trajectory.segments) for span in segment]
        assert found["id"] == [token for _, span in spans for token in span.token_ids]
        assert found["origin"] == "".join(span.origin[0] * len(span) for _, span in spans)
        assert found["segment"] == [number for number, span in spans for _ in span.token_ids]
        assert found["version"] == [span.policy_version for _, span in spans for _ in span.token_ids]
        expected = [value for _, span in spans for value in span.logprobs or [None] * len(span)]
        assert found["rollout_logprob"] == pytest.approx(expected)
        lists = {len(value) for name, value in found.items() if isinstance(value, list)}
        assert lists == {len(found["origin"])}


def test_the_first_token_of_each_segment_is_predicted_by_nothing():
    found = trajectory_json(make_step(), 1, None)["tokens"]
    starts = [0, 5]
    assert [place for place, reason in enumerate(found["mask_reason"]) if reason == "first"] == starts
    for name in ("logprob", "entropy", "turn", "rollout_logprob", "advantage", "mismatch"):
        assert [found[name][place] for place in starts] == [None, None]
    # Rows of the batch are numbered 0 to 7 for this first kept trajectory: 4 of its first segment, 4 of its second.
    assert found["entropy"] == [None, 0, 1, 2, 3, None, 4, 5, 6, 7]
    assert found["turn"] == [None, None, None, 0, 0, None, None, 1, 1, 1]


def test_mismatch_weight_and_old_are_the_learners_against_the_engines():
    found = trajectory_json(make_step(), 1, None)["tokens"]
    place = found["origin"].index("p")
    gap = found["logprob"][place] - found["rollout_logprob"][place]
    assert found["old_logprob"][place] == found["logprob"][place]
    assert found["mismatch"][place] == pytest.approx(gap, rel=1e-3)
    assert found["importance_weight"][place] == pytest.approx(np.exp(gap), rel=1e-3)
    assert found["importance_weight_is"] == "computed"
    assert found["mismatch"][1] is None


def test_recorded_old_logprobs_and_weights_are_shown_rather_than_computed():
    step = make_step()
    rows = step.record.num_tokens
    step.record.streams["old_logprobs"] = np.full(rows, -1.0, dtype=np.float32)
    step.record.streams["importance_weights"] = np.full(rows, 0.5, dtype=np.float32)
    found = trajectory_json(step, 1, None)["tokens"]
    place = found["origin"].index("p")
    assert (found["old_logprob"][place], found["importance_weight"][place]) == (-1, 0.5)
    assert found["importance_weight_is"] == "recorded"


def test_a_token_that_the_correction_left_out_says_so_and_demonstrated_ones_count():
    step = make_step()
    mask = step.record.streams["loss_mask"]
    mask[int(np.flatnonzero(step.record.streams["policy_version"] >= 0)[0])] = False
    reasons = trajectory_json(step, 1, None)["tokens"]["mask_reason"]
    assert reasons[:5] == ["first", "context", "context", "correction", None]
    shown = trajectory_json(step, 3, None)["tokens"]
    assert shown["origin"] == "ccdd"
    assert shown["mask_reason"] == ["first", "context", None, None]


def test_without_streams_of_the_learner_the_lists_are_still_as_long():
    step = make_step()
    for name in ("logprobs", "entropy", "rollout_logprobs"):
        del step.record.streams[name]
    found = token_streams(step.sequences[1], None)
    assert found["logprob"] == found["mismatch"] == found["importance_weight"] == [None] * 10


def test_byte_level_tokens_spell_exact_bytes_and_partial_characters_as_hex():
    tokenizer = make_tokenizer()
    words = TokenText(tokenizer)
    text = "caf\u00e9 \U0001f9ee \u2014 <|end|>\n\x00 x"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert bytes.fromhex("".join(words.spell(token)[1] for token in ids)) == text.encode()
    pieces = [words.spell(token)[0] for token in tokenizer.encode("\U0001f9ee", add_special_tokens=False).ids]
    assert pieces == ["\\xf0", "\\x9f", "\\xa7", "\\xae"]
    assert words.spell(tokenizer.token_to_id("<|end|>")) == ("<|end|>", b"<|end|>".hex())
    for unknown in (10**6, -1, 2**40):
        assert words.spell(unknown) == ("[not in the vocabulary]", "")


def test_byte_fallback_and_metaspace_vocabularies_are_read_too():
    vocabulary = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "x": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = TokenText(tokenizer)
    assert words.spell(1) == (" the", b" the".hex())
    assert words.spell(2) == ("\\xe2", "e2")
    assert words.spell(3) == ("x", "78")


def test_the_tokenizer_is_the_runs_own_then_a_checkpoints_then_a_local_models(named_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("steps = 1\n")
    assert find_token_text(load_run(run)) is None
    local = tmp_path / "local"
    local.mkdir()
    make_tokenizer().save(str(local / "tokenizer.json"))
    assert find_token_text(load_run(run), str(local)).spell(0)[0]
    (run / "model").mkdir()
    (run / "model" / "tokenizer.json").write_text("{broken")
    read = load_run(run)
    assert find_token_text(read) is None
    assert "not a tokenizer" in read.problems[0]
    assert find_token_text(load_run(named_run("running"))).spell(0)[1]


def test_no_torch_is_needed_to_read(named_run):
    import subprocess
    import sys

    code = "import sys; from keel.report import report_data; report_data(sys.argv[1]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(named_run("small"))], check=False)
    assert done.returncode == 0
    assert torch.__version__
