"""Attention over a padded cache: right, and to the bit independent of neighbours and of what lies beyond."""

from __future__ import annotations

import pytest
import torch

from keel.ops.attention import (
    Span,
    apply_sinks,
    attend_cache,
    attend_cache_part,
    build_layout,
    dense_attention,
    visible_mask,
)
from keel.ops.attention.decode import COLUMN_BLOCK, column_counts

HEADS, KV_HEADS, SIZE, CAPACITY, SCALE = 6, 2, 10, 96, 0.3
SINKS = (-20.0, -3.0, 0.0, 1.5, 7.0, 20.0)
POSITIONS = ((4, 5, 6), (40, 41, 42), (0, 1, 2), (93, 94, 95), (12, -1, -1))


def inputs(dtype: torch.dtype, capacity: int = CAPACITY) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = len(POSITIONS)
    shapes = {
        "q": (batch, 3, HEADS, SIZE),
        "k_cache": (batch, KV_HEADS, capacity, SIZE),
        "v_cache": (batch, KV_HEADS, capacity, SIZE),
    }
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**made, "positions": torch.tensor(POSITIONS), "sinks": torch.tensor(SINKS)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("capacity", [CAPACITY, 1200])
def test_equals_the_dense_twin(dtype: torch.dtype, window: int | None, capacity: int) -> None:
    given = inputs(dtype, capacity)
    given["positions"] = given["positions"] * (capacity // CAPACITY)
    out = attend_cache(**given, scale=SCALE, window=window)
    for element, positions in enumerate(given["positions"].tolist()):
        spans = tuple(Span(i, 1, 0, capacity, position) for i, position in enumerate(positions))
        layout = build_layout(spans, window, 3, capacity)
        k, v = given["k_cache"][element].transpose(0, 1), given["v_cache"][element].transpose(0, 1)
        twin, _ = dense_attention(given["q"][element], k, v, given["sinks"], layout, SCALE)
        assert (out[element] - twin).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_row_that_is_not_in_use_is_zero_with_and_without_sinks() -> None:
    given = inputs(torch.float32)
    for sinks in (given["sinks"], None):
        out = attend_cache(**{**given, "sinks": sinks}, scale=SCALE, window=None)
        assert (out[4, 1:] == 0).all()
        assert (out[4, 0] != 0).any()


def test_two_parts_of_a_cache_merge_into_the_whole() -> None:
    """Rows that see nothing of the newer part must count as (0, -inf) there, or the merge is off."""
    given = inputs(torch.float64)
    cut = 32
    parts = []
    for start, stop in ((0, cut), (cut, CAPACITY)):
        mask = visible_mask(
            given["positions"] - start, capacity=stop - start, window=None, group=HEADS // KV_HEADS, dtype=torch.float64
        )
        keys, values = given["k_cache"][:, :, start:stop], given["v_cache"][:, :, start:stop]
        parts.append(attend_cache_part(given["q"], keys, values, scale=SCALE, mask=mask))
    (old, old_lse), (new, new_lse) = parts
    assert (new_lse[0] == float("-inf")).all()
    lse = torch.logaddexp(old_lse, new_lse)
    share = [torch.exp(part_lse - lse).nan_to_num().unsqueeze(-1) for part_lse in (old_lse, new_lse)]
    merged, _ = apply_sinks(old * share[0] + new * share[1], lse, given["sinks"])
    assert (merged - attend_cache(**given, scale=SCALE, window=None)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_an_element_has_the_same_bits_whatever_the_others_hold(dtype: torch.dtype, window: int | None) -> None:
    given = inputs(dtype)
    together = attend_cache(**given, scale=SCALE, window=window)
    for element in range(len(POSITIONS)):
        others = torch.arange(len(POSITIONS)) != element
        changed = {name: tensor.clone() for name, tensor in given.items()}
        for name in ("q", "k_cache", "v_cache"):
            changed[name][others] *= 1e3
        changed["positions"][others] = 95
        assert torch.equal(attend_cache(**changed, scale=SCALE, window=window)[element], together[element])
        alone = {name: given[name][element : element + 1] for name in ("q", "k_cache", "v_cache", "positions")}
        out = attend_cache(**alone, sinks=given["sinks"], scale=SCALE, window=window)
        assert torch.equal(out[0], together[element])


@pytest.mark.parametrize("window", [None, 7])
def test_what_lies_beyond_the_visible_part_of_the_cache_changes_no_bit(window: int | None) -> None:
    given = inputs(torch.float32)
    clean = attend_cache(**given, scale=SCALE, window=window)
    for element, positions in enumerate(POSITIONS):
        given["k_cache"][element, :, max(positions) + 1 :] = 1e30
        given["v_cache"][element, :, max(positions) + 1 :] = -1e30
        if window is not None:
            oldest = max(0, min(p for p in positions if p >= 0) - window + 1)
            given["k_cache"][element, :, :oldest] = 1e30
            given["v_cache"][element, :, :oldest] = 1e30
    assert torch.equal(attend_cache(**given, scale=SCALE, window=window), clean)


def test_a_mask_made_once_gives_the_same_bits() -> None:
    given = inputs(torch.float32)
    mask = visible_mask(given["positions"], capacity=CAPACITY, window=7, group=HEADS // KV_HEADS, dtype=torch.float32)
    with_mask = attend_cache(**given, scale=SCALE, window=7, mask=mask)
    assert torch.equal(with_mask, attend_cache(**given, scale=SCALE, window=7))


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = inputs(torch.float32)
    with pytest.raises(ValueError, match="H a multiple of K"):
        attend_cache(**{**given, "q": given["q"][:, :, :5]}, scale=SCALE, window=None)
    with pytest.raises(ValueError, match="attend_cache needs"):
        attend_cache(**{**given, "v_cache": given["v_cache"][:, :, :5]}, scale=SCALE, window=None)


@pytest.mark.parametrize("heads", [2, 6])
def test_fewer_than_four_query_rows_have_the_same_bits_on_every_thread(heads: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = torch.Generator().manual_seed(3)
        q = torch.randn(40, 1, heads, SIZE, generator=generator)
        caches = torch.randn(2, 40, 2, CAPACITY, SIZE, generator=generator)
        positions = torch.randint(CAPACITY, (40, 1), generator=generator)
        order = torch.randperm(40, generator=generator)
        whole = attend_cache(q, *caches, positions=positions, sinks=None, scale=SCALE, window=None)
        moved = attend_cache(
            q[order], *caches[:, order], positions=positions[order], sinks=None, scale=SCALE, window=None
        )
        assert torch.equal(moved, whole[order])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_reading_fewer_columns_changes_no_bit(dtype: torch.dtype, window: int | None) -> None:
    capacity = 640
    given = inputs(dtype, capacity)
    given["positions"] = given["positions"].clamp(max=60)
    counts = column_counts(capacity, 9, SIZE, dtype, torch.device("cpu"), torch.get_num_threads())
    assert counts[-1] == capacity
    assert all(count % COLUMN_BLOCK == 0 for count in counts)
    whole = attend_cache(**given, scale=SCALE, window=window)
    for count in counts:
        short = {**given, "k_cache": given["k_cache"][:, :, :count], "v_cache": given["v_cache"][:, :, :count]}
        assert torch.equal(attend_cache(**short, scale=SCALE, window=window), whole)


def test_a_ring_holds_what_the_window_sees() -> None:
    given, ring, window = inputs(torch.float64), 32, 7
    plain = attend_cache(**given, scale=SCALE, window=window)
    positions = given["positions"]
    newest = positions.max(-1).values
    for name in ("k_cache", "v_cache"):
        turned = torch.full_like(given[name][:, :, :ring], 1e3)
        for element, last in enumerate(newest.tolist()):
            for place in range(last + 1):
                turned[element, :, place % ring] = given[name][element, :, place]
        given[name] = turned
    mask = visible_mask(
        positions, capacity=ring, window=window, group=HEADS // KV_HEADS, dtype=torch.float64, newest=newest, ring=ring
    )
    assert (attend_cache(**given, scale=SCALE, window=window, mask=mask) - plain).abs().max() < 1e-12
