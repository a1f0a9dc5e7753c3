"""From what lies in a slot to a `GenerateResult`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keel.engines.base import GenerateResult
from keel.types import FinishReason, Routes

if TYPE_CHECKING:
    from keel.engines.embedded.cache import SlotCache
    from keel.engines.embedded.slots import Job, SlotTable


def result_of(job: Job, reason: FinishReason, table: SlotTable, cache: SlotCache, version: int) -> GenerateResult:
    """What was drawn, why it ended, the routes of what was fed. A job that never got a slot has drawn nothing."""
    spans = table.drawn_spans(job) if job.slot >= 0 else ()
    error = None
    if reason == "error":
        place = job.num_prompt + sum(len(span.token_ids) for span in spans)
        error = f"logits were not finite for the token at position {place}, policy version {version}"
    return GenerateResult(
        request_id=job.request.request_id,
        spans=spans,
        finish_reason=reason,
        sampling=job.request.sampling,
        num_cached_tokens=job.num_cached,
        routes_start=job.num_cached,
        routed_experts=_routes_of(job, table, cache),
        error=error,
    )


def keep_routes(job: Job, table: SlotTable, cache: SlotCache) -> None:
    """Put aside the routes with which tokens were drawn, before the tokens are fed again under new weights."""
    if job.slot < 0 or not job.request.return_routes or cache.routes is None:
        return
    start, fed = job.num_cached + job.num_old_routes, int(table.fed[job.slot])
    if int(table.known[job.slot]) > job.num_prompt and fed > start:
        job.old_routes += cache.read_routes(job.slot, start, fed)
        job.num_old_routes += fed - start


def as_routes(data: bytes, num_tokens: int, cache: SlotCache) -> Routes | None:
    """Raw bytes of `num_tokens` tokens as `Routes`; None if the cache keeps none."""
    if cache.routes is None:
        return None
    _, _, num_layers, top_k = cache.routes.shape
    return Routes(data, num_tokens, num_layers, top_k)


def _routes_of(job: Job, table: SlotTable, cache: SlotCache) -> Routes | None:
    if not job.request.return_routes or job.slot < 0:
        return None
    start = job.num_cached + job.num_old_routes
    stop = max(start, int(table.fed[job.slot]))
    return as_routes(job.old_routes + cache.read_routes(job.slot, start, stop), stop - job.num_cached, cache)
