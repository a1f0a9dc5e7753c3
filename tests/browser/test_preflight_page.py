"""A preflight's page in a browser: every check is seen, the gap is drawn, and hostile text stays text."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from keel.preflights.page import write_page
from keel.preflights.result import Attribution, Check, GapSample, PreflightResult
from tests.browser.conftest import DESK, PHONE
from tests.hostile import MARK, SMALL

pytestmark = pytest.mark.browser

CHECKS = (
    Check("render", "Rendering round trips", "pass", "24 of 24 came back"),
    Check("gap", "Engine against learner", "fail", "too large", 0.06, 5e-6, "nats", "see below", {"layers": [0, 2]}),
    Check("memory", "Memory plan", "warn", "nearly full", 18.2, 20.0, "GiB", "lower engine.slots"),
    Check("sync", "Weights arrive", "skip", "the server is attached", fix="pass --allow-weight-push"),
)
BLAME = (
    Attribution("window_off", "engine", 0.97, 0.06, 0.002, layer=2),
    Attribution("unexplained", None, 0.03, 0.002, 0.002),
)


def made(texts: tuple[str, ...] = (), count: int = 400) -> PreflightResult:
    draw = random.Random(3)
    learner = tuple(-draw.expovariate(1.0) for _ in range(count))
    engine = tuple(value + draw.gauss(0, 0.1) for value in learner)
    names = tuple(texts[index % len(texts)] for index in range(count)) if texts else ()
    sample = GapSample(engine, learner, tuple(range(count)), (0,) * count, names, count)
    return PreflightResult({"model": "tiny", "engine": "embedded"}, CHECKS, BLAME, {"abs_mean": 0.06}, 5e-6, sample)


@pytest.mark.parametrize(("size", "dark"), [(DESK, False), (DESK, True), (PHONE, False)])
def test_everything_found_is_on_the_page(open_page, tmp_path: Path, size: tuple[int, int], dark: bool) -> None:
    page = open_page(write_page(made(), tmp_path / "page.html"), size, dark=dark)
    assert "sliding window not applied in the engine, which explains 97 %" in page.locator(".verdict h2").inner_text()
    rows = page.locator(".check")
    assert [row.locator(".pill").inner_text() for row in rows.all()] == ["failed", "warned", "passed", "skipped"]
    boxes = [row.bounding_box() for row in rows.all()]
    assert all(0 <= box["x"] <= size[0] - box["width"] for box in boxes)
    for above, below in pairwise(boxes):  # all of them where they can be seen, one below the other
        assert above["height"] > 20
        assert above["y"] + above["height"] <= below["y"] + 1
    assert "0.06 / 5×10⁻⁶ nats" in rows.first.inner_text()
    assert page.locator(".plot .main-svg").count() >= 3
    assert page.locator(".plot .point").count() > 400
    bar, row = (
        page.locator(".blame-row").first.locator(name).bounding_box() for name in (".blame-bar span", ".blame-bar")
    )
    assert bar["width"] / row["width"] == pytest.approx(0.97, abs=0.01)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_nothing_to_explain_is_said(open_page, tmp_path: Path) -> None:
    healthy = PreflightResult({"model": "tiny"}, CHECKS[:1])
    page = open_page(write_page(healthy, tmp_path / "page.html"))
    assert "Fit for on-policy training" in page.locator(".verdict h2").inner_text()
    assert "nothing to explain" in page.locator("[aria-label='What explains the gap']").inner_text()


def test_hostile_text_stays_text(open_page, tmp_path: Path) -> None:
    texts = tuple(SMALL.values())
    checks = tuple(
        Check(f"c{i}", text, "warn", text, math.pi, fix=text, details={text: text}) for i, text in enumerate(texts)
    )
    shown = made(texts, count=len(texts) * 4)
    hostile = PreflightResult(dict.fromkeys(texts, "x"), checks, BLAME, {}, None, shown.sample, versions={"<b>": "<i>"})
    page = open_page(write_page(hostile, tmp_path / "page.html"))
    assert page.locator(".check").count() == len(texts)
    assert page.evaluate(f"window.{MARK}") is None
    assert page.locator("main b, main i, main img, main script, main iframe").filter(has_text=MARK).count() == 0
