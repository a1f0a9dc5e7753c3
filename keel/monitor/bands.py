"""Where a metric lies on a healthy stack: what a run warns at, its report shades and its verdict measures against."""

from __future__ import annotations

from dataclasses import dataclass, replace

from keel.config import TrainConfig

MISMATCH = "mismatch/abs_mean"


@dataclass(frozen=True, slots=True)
class Band:
    """A metric is healthy up to `healthy_max`; `text` says where the number comes from."""

    healthy_max: float
    text: str


BANDS = {
    "float32": Band(
        1e-5,
        "float32: engine and learner differ by rounding alone, a few times 1e-7; above 1e-5 something else differs",
    ),
    "bfloat16": Band(
        0.03,
        "bfloat16: engine and learner round differently; a mean up to 0.03 nats is usual, above it look for a cause",
    ),
}
"""By type, the mean of `|learner - engine|` per drawn token, in nats."""


def bands(config: TrainConfig | None) -> dict[str, Band]:
    """Metric -> band. Without a readable config the wider band of bfloat16 is taken, and said.

    float32: engine and learner compute the same sums in another order; measured gaps are 2e-7 (docs/numerics.md), and a
    hundred times that is still rounding. bfloat16 rounds to 8 bits of mantissa, so single log-probs differ by several
    hundredths; means of a few hundredths are what inference engines and trainers of the same weights show.
    """
    if config is None:
        band = BANDS["bfloat16"]
        why = "config.toml could not be read, so the wider band is shown"
        return {MISMATCH: replace(band, text=f"{band.text} ({why})")}
    return {MISMATCH: BANDS[config.model.dtype]}
