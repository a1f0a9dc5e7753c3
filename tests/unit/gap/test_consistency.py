"""The monitor's look at a step: the same however the batch was cut, rejected tokens counted, secrets kept out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from keel.algo import correction
from keel.algo.apply import correct
from keel.batch import pack
from keel.config_monitor import MonitorConfig
from keel.gap.consistency import Consistency
from keel.gap.statistics import gap_statistics, peer_statistics
from keel.learner.base import Update


def words(ids):
    return "".join(f"<{each}>" for each in ids)


def learned(batch, noise):
    """Updates as a learner returns them, one for each of the batch's; `noise` is added to the engine's log-probs."""
    draw = torch.Generator().manual_seed(7)
    every = torch.cat([m.rollout_logprobs for m in batch.micro_batches])
    own = (every + noise * torch.randn(every.shape, generator=draw)).split([m.num_tokens for m in batch.micro_batches])
    updates = []
    for index in range(batch.num_updates):
        places = range(*batch.update_bounds[index : index + 2])
        streams = {place: {"logprobs": own[place]} for place in places}
        updates.append(Update(index, index, index == batch.num_updates - 1, 0.0, 0.0, True, 1, {}, streams))
    return updates


def look(groups, *, max_tokens=10_000, num_updates=1, noise=0.1, step=0, **options):
    batch = pack(groups, max_tokens=max_tokens, num_updates=num_updates)
    return Consistency(MonitorConfig(**options), words).look(step, batch, learned(batch, noise))


def test_figures_do_not_depend_on_how_the_batch_was_cut(make_groups):
    groups = make_groups(4, 3)
    whole = look(groups)
    assert whole.metrics["mismatch/abs_p99"] > whole.metrics["mismatch/abs_p50"] > 0
    for max_tokens, updates in ((64, 1), (1, 1), (100, 2), (100, 4)):
        cut = look(groups, max_tokens=max_tokens, num_updates=updates)
        assert cut.metrics == whole.metrics
        assert cut.rows() == whole.rows()


def test_figures_are_those_of_all_drawn_tokens(make_groups):
    groups = make_groups(3, 2)
    batch = pack(groups, max_tokens=200)
    updates = learned(batch, 0.1)
    found = Consistency(MonitorConfig(), words).look(0, batch, updates)
    drawn = torch.cat([m.policy_version >= 0 for m in batch.micro_batches]).numpy()
    rollout = torch.cat([m.rollout_logprobs for m in batch.micro_batches]).numpy()[drawn]
    learner = torch.cat([updates[0].streams[i]["logprobs"] for i in range(len(batch.micro_batches))]).numpy()[drawn]
    owner = torch.cat([m.row_to_trajectory for m in batch.micro_batches]).numpy()[drawn]
    assert sum(
        len(s) for g in groups for t in g.trajectories for seg in t.segments for s in seg if s.origin == "policy"
    ) == len(rollout)
    ours, theirs = gap_statistics(rollout, learner), peer_statistics(rollout, learner, owner)
    for name in ("abs_p50", "abs_p90", "abs_p99", "ess", "chi2"):
        assert found.metrics[f"mismatch/{name}"] == ours[name]
    assert {name: value for name, value in found.metrics.items() if name.startswith("peers/")} == {
        f"peers/{name}": pytest.approx(value, rel=1e-12) for name, value in theirs.items()
    }


def test_worst_tokens_stand_where_they_say(make_groups):
    groups = make_groups(2, 2)
    found = look(groups, worst_tokens=5)
    assert len(found.worst) == 5
    gaps = [abs(each.gap) for each in found.worst]
    assert gaps == sorted(gaps, reverse=True)
    by_name = {f"{t.group_id}/{t.attempt}": t for group in groups for t in group.trajectories}
    for each in found.worst:
        (segment,) = by_name[each.where].segments
        tokens = segment.token_ids
        assert (each.length, each.token_id) == (len(tokens), tokens[each.position])
        assert each.text == words([each.token_id])
        assert each.before == words(tokens[max(0, each.position - 12) : each.position])
        logprobs = [p for span in segment for p in (span.logprobs or [None] * len(span))]
        assert each.rollout_logprob == pytest.approx(logprobs[each.position])
        assert each.drawn_before == sum(p is not None for p in logprobs[: each.position])


def test_tokens_that_a_correction_rejected_are_counted(make_groups):
    """A mask that hides the gap does not make it small."""
    batch = pack(make_groups(2, 2), max_tokens=10_000)
    updates = learned(batch, 1.0)
    scored = batch.with_micro_batches(
        dataclasses.replace(m, old_logprobs=updates[0].streams[i]["logprobs"])
        for i, m in enumerate(batch.micro_batches)
    )
    corrected = correct(scored, ((correction.token_masked, {"low": 0.9, "high": 1.1}),))
    assert corrected.num_loss_tokens < batch.num_loss_tokens
    looks = [Consistency(MonitorConfig(), words).look(0, each, updates) for each in (scored, corrected)]
    assert looks[0] == looks[1]
    assert looks[0].metrics["mismatch/abs_p50"] > 0.2


def test_only_every_so_many_steps_and_never_if_so_asked(make_groups):
    groups = make_groups(1, 2)
    due = [step for step in range(7) if look(groups, step=step, consistency_every=3).metrics]
    assert due == [0, 3, 6]
    assert not look(groups, consistency_every=0).metrics
    assert not look(groups, worst_tokens=0).worst
    assert look(groups, worst_tokens=0).metrics


def test_demonstrations_were_drawn_by_nobody(make_groups):
    batch = pack(make_groups(1, 2, demonstration=True), max_tokens=1000)
    found = Consistency(MonitorConfig(), words).look(0, batch, [])
    assert (found.metrics, found.worst) == ({}, ())


def test_what_is_no_number_is_counted_and_left_out(make_groups):
    batch = pack(make_groups(1, 2), max_tokens=10_000)
    updates = learned(batch, 0.1)
    stream = updates[0].streams[0]["logprobs"]
    drawn = int((batch.micro_batches[0].policy_version >= 0).nonzero()[0])
    stream[drawn] = math.nan
    found = Consistency(MonitorConfig(), words).look(0, batch, updates)
    assert found.metrics["mismatch/not_finite"] == 1.0
    assert all(math.isfinite(value) for value in found.metrics.values())
    assert all(math.isfinite(each.gap) for each in found.worst)


def test_a_run_of_two_ranks_logs_what_its_records_say(tmp_path, make_config):
    """The row of a step has the figures of that step's record, which is another way to them."""
    import json

    import keel
    from keel.loop import train

    config = make_config(
        tmp_path / "run", steps=1, warm_start={"steps": 0}, eval={"num_tasks": 0}, learner={"ranks": 2},
        batch={"max_tokens": 256}, rollout={"group_size": 4},
    )  # fmt: skip
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [each for each in rows if each["kind"] == "step"]
    (worst,) = [each for each in rows if each["kind"] == "worst_tokens"]
    found = keel.mismatch(tmp_path / "run" / "steps" / "000000.safetensors")
    for name in ("abs_p50", "abs_p90", "abs_p99", "ess", "chi2"):
        assert row[f"mismatch/{name}"] == pytest.approx(found.statistics[name], rel=1e-12, abs=1e-18)
    for name in ("abs_mean", "abs_max", "k1", "k3"):
        assert row[f"mismatch/{name}"] == pytest.approx(found.statistics[name], rel=1e-3, abs=1e-13)
    assert row["peers/train_rollout_logprob_abs_diff"] == pytest.approx(
        found.peers["train_rollout_logprob_abs_diff"], rel=1e-9
    )
    assert [each["gap"] for each in worst["tokens"]] == [each.gap for each in found.worst[:8]]
    assert [each["text"] for each in worst["tokens"]] == [each.text for each in found.worst[:8]]
    assert worst["step"] == row["step"] == 0


def test_secrets_in_what_a_model_wrote_stay_out_of_the_row(tmp_path: Path, make_config, make_groups):
    from keel.monitor.runlog import RunLog

    secret = "hf_" + "a1B2" * 8

    def leaking(ids):
        return secret

    batch = pack(make_groups(1, 2), max_tokens=10_000)
    found = Consistency(MonitorConfig(), leaking).look(0, batch, learned(batch, 0.1))
    with RunLog.open(make_config(tmp_path / "run")) as run:
        run.log_worst_tokens(found.rows(), step=0)
        run.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "worst_tokens" in text
    assert secret not in text
    assert np.isfinite(found.worst[0].gap)
