"""Options of what watches a run."""

from __future__ import annotations

from pydantic import Field

from keel.config_base import Section


class MonitorConfig(Section):
    max_skips: int = Field(5, ge=1, description="updates skipped in a row (not finite) that end the run")
    stall_timeout_s: float = Field(
        600.0, ge=0, description="seconds without any progress after which all stacks are written to stalls/; 0: never"
    )
    min_signal_share: float = Field(
        0.1, ge=0, le=1, description="share of groups carrying a signal below which the run warns; 0: never"
    )
    consistency_every: int = Field(
        1, ge=0, description="steps between looks at the gap's distribution, under the peers' names too; 0: never"
    )
    worst_tokens: int = Field(
        8, ge=0, le=100, description="tokens with the largest gap that such a look keeps, with their text"
    )
