"""What top-k and top-p left to choose from, of all drawn tokens of a batch, as streams of its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from keel.types import SamplingSettings, TokenSpan

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SupportRows:
    """What the tokens of a batch were chosen from, if any distribution was cut; ids lie token after token."""

    settings: Mapping[str, Array]  # top_k, top_p and support_missing, [num_tokens]
    ids: Array  # [M] int32
    bounds: Array  # [num_tokens + 1]

    @classmethod
    def of(cls, spans: Sequence[TokenSpan], tokens: Array) -> SupportRows | None:
        """Of `spans`, whose ids are `tokens [num_tokens]`; None if nothing was cut.

        Raises ValueError for a drawn token that is not in its own support.
        """
        settings = [span.sampling or SamplingSettings() for span in spans]
        if not any(each.is_cut for each in settings):
            return None
        sizes = [len(span) for span in spans]
        missing = [each.is_cut and span.support is None for each, span in zip(settings, spans, strict=True)]
        counts = np.fromiter(
            chain.from_iterable(span.support.counts if span.support else [0] * len(span) for span in spans),
            dtype=np.int64,
            count=len(tokens),
        )
        ids = np.frombuffer(b"".join(span.support.ids for span in spans if span.support), dtype=np.uint32)
        drawn_from = np.repeat(np.arange(len(tokens)), counts)
        found = np.zeros(len(tokens), dtype=np.bool_)
        found[drawn_from[ids == tokens[drawn_from]]] = True
        if (lost := np.flatnonzero((counts > 0) & ~found)).size:
            raise ValueError(
                f"pack: token {tokens[lost[0]]} is not among the {counts[lost[0]]} that the engine says it was chosen "
                f"from, and so are {lost.size - 1} others; the engine's support is not that of its draws"
            )
        return cls(
            {
                "top_k": np.repeat(np.array([each.top_k for each in settings], dtype=np.int32), sizes),
                "top_p": np.repeat(np.array([each.top_p for each in settings], dtype=np.float64), sizes),
                **({"support_missing": np.repeat(np.array(missing), sizes)} if any(missing) else {}),
            },
            ids.astype(np.int32),
            np.concatenate([[0], np.cumsum(counts)]),
        )

    def streams(self, labels: Array) -> dict[str, torch.Tensor]:
        """`support_ids` and `support_offsets` of the tokens `labels [T]`, whose ids are taken in their order."""
        starts, counts = self.bounds[labels], self.bounds[labels + 1] - self.bounds[labels]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(int(offsets[-1])) + np.repeat(starts - offsets[:-1], counts)
        return {
            "support_ids": torch.from_numpy(self.ids[places]),
            "support_offsets": torch.from_numpy(offsets.astype(np.int64)),
        }
