"""What the mixin for TRL's trainer takes out of a batch, and that `keel mismatch` reads it."""

from __future__ import annotations

import math

import pytest
import torch

import keel
from keel.gap.log import GapLogError
from keel.gap.trl import CaptureGap, captured, write_capture

NAN = math.nan


def batch():
    """Two completions as `_generate_and_score_completions` returns them: prompts padded left, completions right."""
    return {
        "prompt_ids": torch.tensor([[0, 11, 12], [21, 22, 23]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[13, 14, 15, 16], [24, 25, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),  # padded with 1, as TRL pads it
        "sampling_per_token_logps": torch.tensor([[-1.0, 0.0, -2.0, NAN], [-0.5, -0.5, 0.0, 0.0]]),
        "old_per_token_logps": torch.tensor([[-1.5, -7.0, -2.0, -1.0], [-0.5, -0.25, -3.0, -3.0]]),
        "advantages": torch.zeros(2),
    }


def test_padding_goes_and_the_worlds_tokens_are_not_drawn():
    found = {name: stream.tolist() for name, stream in captured(batch(), temperature=0.5).items()}
    assert found["cu_seqlens"] == [0, 6, 11]
    assert found["token_ids"] == [11, 12, 13, 14, 15, 16, 21, 22, 23, 24, 25]
    assert found["drawn"] == [False, False, True, False, True, False, False, False, False, True, True]
    assert found["rollout_logprobs"] == [0, 0, -1, 0, -2, 0, 0, 0, 0, -0.5, -0.5]
    assert found["learner_logprobs"] == [0, 0, -1.5, 0, -2, 0, 0, 0, 0, -0.5, -0.25]
    assert found["temperature"] == [0.5] * 11


def test_what_it_writes_is_read(tmp_path):
    write_capture(tmp_path / "gap" / "step_000000_00_rank_0.safetensors", batch())
    report = keel.mismatch(tmp_path / "gap")
    assert (report.num_sequences, report.num_tokens) == (2, 4)
    # TRL's own figure: over drawn tokens with a sampling log-prob
    assert report.peers["sampling_logp_difference_mean"] == pytest.approx((0.5 + 0 + 0 + 0.25) / 4)


def test_one_side_is_written_and_neither_is_refused(tmp_path):
    half = {name: value for name, value in batch().items() if name != "old_per_token_logps"}
    write_capture(tmp_path / "a.safetensors", half)
    with pytest.raises(GapLogError, match="lack the learner's log-probs"):
        keel.mismatch(tmp_path / "a.safetensors")
    neither = {name: value for name, value in half.items() if name != "sampling_per_token_logps"}
    with pytest.raises(GapLogError, match="use_vllm=True"):
        captured(neither)
    with pytest.raises(GapLogError, match="no completion_mask"):
        captured({name: value for name, value in batch().items() if name != "completion_mask"})


def test_the_mixin_hands_the_batch_on_and_writes_while_training_alone(tmp_path):
    """A class in the place of TRL's, with the five names the mixin asks it for; TRL itself is not a dependency."""
    made = batch()

    class Place:
        class model:  # noqa: N801
            training = True

        class state:  # noqa: N801
            global_step = 3

        class accelerator:  # noqa: N801
            process_index = 1

        temperature = 0.7

        def _generate_and_score_completions(self, inputs):
            assert inputs == "inputs"
            return made

    class Trainer(CaptureGap, Place):
        gap_directory = str(tmp_path)

    trainer = Trainer()
    for _ in range(2):
        assert trainer._generate_and_score_completions("inputs") is made
    Place.model.training = False
    trainer._generate_and_score_completions("inputs")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "step_000003_00_rank_1.safetensors",
        "step_000003_01_rank_1.safetensors",
    ]
