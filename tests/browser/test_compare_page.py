"""Two runs on one page: options, intervals, curves over one axis, and where they part."""

from __future__ import annotations

import pytest

from tests.browser.conftest import DESK, PHONE

pytestmark = pytest.mark.browser


def test_two_runs_side_by_side(open_page, comparison_of):
    page = open_page(comparison_of("crashed", "other_seed"))
    charts = page.locator("[data-chart]")
    assert charts.count() == 6
    for chart in charts.all():
        assert chart.locator(".scatterlayer .trace").count() == 2
    colours = page.locator("[data-chart='reward/mean'] path.js-line")
    assert len(set(colours.evaluate_all("(all) => all.map((one) => one.style.stroke)"))) == 2
    options = page.locator("[aria-label=Config] tbody th").all_inner_texts()
    assert {"seed", "optim.lr"} <= set(options)
    parting = page.locator("[aria-label='Where they part']").inner_text()
    assert "warm start step 0" in parting
    assert "First token that differs" in parting
    rows = page.locator(".forest-row:not(.forest-foot)")
    assert rows.count() == 2
    assert rows.first.locator(".difference .dot").count() == 1
    dot, whisker = (rows.first.locator(f".difference .{name}").bounding_box() for name in ("dot", "whisker"))
    middle = dot["x"] + dot["width"] / 2
    assert whisker["x"] < middle < whisker["x"] + whisker["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= DESK[0]


def test_one_pointer_reads_both_runs(open_page, comparison_of):
    page = open_page(comparison_of("crashed", "other_seed"))
    value = page.locator("[data-chart='reward/mean'] .value")
    newest = value.inner_text()
    box = page.locator("[data-chart='policy/entropy'] .chart").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 40)
    assert value.inner_text() != newest
    assert page.locator(".hair:not([hidden])").count() == 6
    page.mouse.move(2, 2)
    assert value.inner_text() == newest


def test_equal_runs_are_called_equal(open_page, comparison_of):
    page = open_page(comparison_of("crashed", "crashed"), dark=True)
    assert "Equal in every number" in page.locator("[aria-label='Where they part']").inner_text()
    assert "The configs are the same" in page.locator("[aria-label=Config]").inner_text()


def test_a_comparison_fits_a_phone(open_page, comparison_of):
    page = open_page(comparison_of("broken", "empty"), PHONE)
    page.locator("path.js-line").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
