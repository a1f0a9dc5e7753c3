"""What a long attempt costs."""

from __future__ import annotations

import pytest

from keel.rewards import soft_overlong
from keel.types import SamplingSettings, Segment, Task, TokenSpan, Trajectory


def drawn(count: int) -> Trajectory:
    """An attempt of `count` drawn tokens behind a long prompt, which costs nothing."""
    spans = (TokenSpan((1,) * 50, "context"), TokenSpan((2,) * count, "policy", (0.0,) * count, 0, SamplingSettings()))
    return Trajectory(Task("t"), "g", 0, (), (), (Segment(spans),), "completed")


@pytest.mark.parametrize(
    ("count", "wanted"), [(0, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (40, -1.0)]
)
def test_the_line_between_nothing_and_all(count, wanted):
    assert soft_overlong(drawn(count), Task("t"), limit=20, margin=8) == wanted
    assert soft_overlong(drawn(count), Task("t"), limit=20, margin=8, penalty=0.5) == wanted / 2


@pytest.mark.parametrize("options", [{"margin": 0}, {"margin": 9}, {"margin": 4, "penalty": -1}])
def test_impossible_lengths_are_refused(options):
    with pytest.raises(ValueError, match="got limit=8"):
        soft_overlong(drawn(1), Task("t"), limit=8, **options)
