"""Too little memory is recognized by what really raises it, and told with what to turn."""

from __future__ import annotations

import errno
import typing

import pytest
import torch

from keel.config import TrainConfig
from keel.monitor.exhausted import (
    KNOBS,
    MemoryExhaustedError,
    describe,
    is_out_of_memory,
    told_if_exhausted,
)
from keel.monitor.progress import Phase, Progress

CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which ..."


def raised_by(function):
    try:
        function()
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is looked at)
        return error
    raise AssertionError("it was to raise")


def test_what_means_too_little_memory():
    assert is_out_of_memory(raised_by(lambda: torch.empty(2**50)))
    assert is_out_of_memory(raised_by(lambda: bytearray(2**60)))
    assert is_out_of_memory(torch.OutOfMemoryError("of a card"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError(f"all 8 episodes failed; the first: engine_error: {CUDA_TEXT}"))
    for other in (RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space"), ValueError("out of memory lane")):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize("phase", typing.get_args(Phase))
def test_every_phase_has_options_that_exist(phase):
    progress = Progress()
    progress.enter(phase)
    text = describe(RuntimeError(CUDA_TEXT), TrainConfig(), progress)
    assert text.startswith("out of memory while ")
    assert "2.50 GiB more could not be had" in text
    assert KNOBS[phase][0] in text or KNOBS[phase][1] in text


def test_sizes_and_values_are_told():
    progress = Progress()
    progress.begin("reinforcement", 12, 40)
    progress.enter("backward", tokens_in_the_largest_batch=4000, sequences_in_it=7)
    config = TrainConfig()
    with pytest.raises(MemoryExhaustedError) as caught, told_if_exhausted(config, progress):
        torch.empty(2**50)
    text = str(caught.value)
    assert (
        "computing the gradient at reinforcement step 13 of 40 (4,000 tokens in the largest batch, 7 sequences" in text
    )
    assert "4,294,967,296.0 MiB more could not be had" in text
    assert f"batch.max_tokens lower (is {config.batch.max_tokens})" in text


def test_other_errors_pass_as_they_are():
    with pytest.raises(ZeroDivisionError), told_if_exhausted(TrainConfig(), Progress()):
        raise ZeroDivisionError
