from __future__ import annotations

import math

from keel.report.series import KEEPS_EXTREMES, columns


def test_every_row_is_kept_while_a_page_can_draw_them_and_columns_are_equally_long(make_rows):
    rows = make_rows(50)
    rows[7]["rollout/only_here"] = 3.0
    found = columns(rows, max_rows=50)
    assert {len(column) for column in found.values()} == {50}
    assert found["step"] == list(range(50))
    assert found["train_step"] == list(range(1, 51))
    assert found["rollout/only_here"] == [None] * 7 + [3] + [None] * 42
    assert found["policy/ratio_max_dev"] == [0] * 50
    assert not {"kind", "not_finite", "schema_version"} & set(found)


def test_thinning_keeps_the_ends_the_extremes_and_what_must_stay(make_rows):
    rows = make_rows(9_000, **{"policy/grad_norm": lambda step: 0.2 + 0.01 * math.sin(step)})
    rows[4_321]["policy/grad_norm"] = 77.0
    rows[6_543]["reward/mean"] = -5.0
    rows[5_001]["policy/loss"] = None
    rows[5_001]["not_finite"] = {"policy/loss": "nan"}
    found = columns(rows, max_rows=500, always=frozenset({1_234}))
    assert len(found["step"]) <= 510
    assert found["step"] == sorted(set(found["step"]))
    assert {0, 8_999, 4_321, 6_543, 5_001} <= set(found["step"])
    assert 1_234 in found["train_step"]
    assert max(found["policy/grad_norm"]) == 77.0
    assert min(found["reward/mean"]) == -5.0
    assert found["policy/loss"][found["step"].index(5_001)] is None


def test_every_stretch_keeps_its_own_extremes(make_rows):
    rows = make_rows(4_000, **{"mismatch/abs_mean": lambda step: 1.0 if step % 1_000 == 503 else 1e-7})
    found = columns(rows, max_rows=400)
    assert "mismatch/abs_mean" in KEEPS_EXTREMES
    assert found["mismatch/abs_mean"].count(1) == 4


def test_a_metric_that_was_never_finite_is_there_as_gaps(make_rows):
    rows = make_rows(3)
    for row in rows:
        row["policy/kl"] = None
        row["not_finite"] = {"policy/kl": "nan"}
    assert columns(rows)["policy/kl"] == [None, None, None]
