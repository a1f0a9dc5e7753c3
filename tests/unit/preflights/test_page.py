"""A preflight's page: what of a result is drawn, and that nothing in it is markup."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from keel.preflights.page import MAX_DRAWN, page_data, write_page
from keel.preflights.result import Attribution, Check, GapSample, PreflightResult, headline
from tests.hostile import SMALL

PASSED = Check("rendering", "Rendering round trips", "pass", "24 of 24 came back")
FAILED = Check("gap", "Engine against learner", "fail", "too large", 0.06, 5e-6, "nats", "see below", {"layers": [0]})
SKIPPED = Check("sync", "Weights arrive", "skip", "the server is attached")
WINDOW = Attribution("window_off", "engine", 0.97, 0.06, 0.002, strength=1.0)


def sample(count: int, seed: int = 5) -> GapSample:
    draw = random.Random(seed)
    learner = [-draw.expovariate(1.0) for _ in range(count)]
    engine = [value + draw.gauss(0, 10 ** draw.uniform(-7, -1)) for value in learner]
    return GapSample(tuple(engine), tuple(learner), tuple(range(count)), (0,) * count, num_tokens=count)


def result(**changes: object) -> PreflightResult:
    made = PreflightResult({"model": "m"}, (PASSED, FAILED, SKIPPED), (WINDOW,), {"abs_mean": 0.06}, 5e-6, sample(40))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_result_is_itself_again_after_json() -> None:
    made = result(versions={"torch": "2"})
    assert PreflightResult.from_json(json.loads(json.dumps(made.to_json()))) == made
    with pytest.raises(ValueError, match="schema version 7"):
        PreflightResult.from_json({**made.to_json(), "schema_version": 7})


def test_the_verdict_is_the_worst_check_and_a_skipped_one_decides_nothing() -> None:
    assert result().verdict == "fail"
    assert result(checks=(PASSED, SKIPPED)).verdict == "pass"
    assert result(checks=(PASSED, replace(FAILED, status="warn"))).verdict == "warn"


def test_the_headline_names_cause_side_and_share() -> None:
    assert headline(result()) == (
        "Not fit for on-policy training. Likely reason: sliding window not applied in the engine, which explains "
        "97 % of the gap."
    )
    assert "first: engine against learner" in headline(result(attribution=()))
    assert headline(result(checks=(PASSED, SKIPPED), attribution=())) == (
        "Fit for on-policy training: 1 checks passed; 1 could not be asked."
    )


def test_a_notebook_and_print_show_checks_cause_and_verdict() -> None:
    lines = str(result()).splitlines()
    assert lines[:3] == [f"{each.status}  {each.title}: {each.reason}" for each in (PASSED, FAILED, SKIPPED)]
    assert lines[3] == "97% of the gap: sliding window not applied, in the engine"
    assert lines[4].startswith("fail: Not fit for on-policy training.")
    cell = result()._repr_html_()
    assert all(text in cell for text in (PASSED.title, FAILED.fix, "sliding window not applied, in the engine"))
    hostile = result(checks=(replace(FAILED, reason="<script>alert(1)</script>\x1b[2J"),))
    assert "<script>" not in hostile._repr_html_()
    assert "\x1b" not in str(hostile)


def test_the_worst_tokens_are_drawn_and_every_token_is_counted() -> None:
    whole = sample(3 * MAX_DRAWN)
    gaps = sorted((abs(a - b) for a, b in zip(whole.engine, whole.learner, strict=True)), reverse=True)
    drawn = page_data(result(sample=whole))["sample"]
    assert sum(drawn["histogram"]["count"]) == 3 * MAX_DRAWN
    assert MAX_DRAWN <= len(drawn["engine"]) <= 1.2 * MAX_DRAWN
    assert [one["gap"] for one in drawn["worst"]] == pytest.approx(gaps[:12], rel=1e-5)
    worst = sorted(drawn["gap_log10"], reverse=True)[: MAX_DRAWN // 10]
    assert worst == pytest.approx([math.log10(gap) for gap in gaps[: MAX_DRAWN // 10]], rel=1e-5)
    # each bin holds the gaps of its own quarter of a power of ten
    for center, count in zip(drawn["histogram"]["center_log10"], drawn["histogram"]["count"], strict=True):
        low, high = 10 ** (center - 0.125), 10 ** (center + 0.125)
        assert count == sum(low <= max(gap, 1e-9) < high for gap in gaps)


def test_a_gap_that_is_no_number_is_the_worst_of_all_and_no_number_on_the_page() -> None:
    odd = GapSample((-1.0, math.nan, -2.0), (-1.5, -1.0, -2.0), (0, 1, 2), (0, 0, 0), ("a", "b", "c"), 3)
    drawn = page_data(result(sample=odd, noise=math.nan, gap={"abs_max": math.inf}))
    assert [one["text"] for one in drawn["sample"]["worst"]] == ["b", "a", "c"]
    assert drawn["sample"]["worst"][0]["gap"] is None
    assert drawn["noise"] is None
    assert drawn["gap"] == {"abs_max": None}
    json.dumps(drawn, allow_nan=False)


def test_no_text_of_a_result_is_markup(tmp_path: Path) -> None:
    texts = list(SMALL.values())
    checks = tuple(Check(f"c{i}", text, "warn", text, fix=text, details={text: text}) for i, text in enumerate(texts))
    hostile = replace(sample(len(texts)), text=tuple(texts))
    path = write_page(result(checks=checks, sample=hostile, stack=dict.fromkeys(texts, "x")), tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition('<script type="application/json" id="keel-data">')
    data, _, _ = rest.partition("</script>")
    assert "<" not in data
    assert data.isascii()
    assert [check["title"] for check in json.loads(data)["checks"]] == [
        check["title"] for check in page_data(result(checks=checks))["checks"]
    ]
    assert "Content-Security-Policy" in head
