"""The first screen: everything that matters without scrolling, on a desk and on a phone, in light and dark."""

from __future__ import annotations

import re

import pytest

from tests.browser.conftest import DESK, PHONE

pytestmark = pytest.mark.browser

ON_THE_FIRST_SCREEN = [
    ".verdict h2",
    "[data-chart=success]",
    "[data-chart=reward]",
    "[data-chart=mismatch]",
    "[data-chart=entropy]",
    "[data-chart=gradient]",
    "[data-chart=alarms]",
    ".strip",
    "[aria-label='Where time went']",
    "[aria-label='Three episodes to read']",
]
CONTRAST = """(pairs) => pairs.map(([front, back]) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const luminance = (name) => {
    canvas.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((byte) => byte / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [light, dark] = [luminance(front), luminance(back)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
})"""


@pytest.mark.parametrize("name", ["thousand", "crashed", "broken", "running", "hostile", "empty", "no_records"])
def test_everything_that_matters_is_seen_without_scrolling(open_page, report_of, name):
    page = open_page(report_of(name))
    page.wait_for_selector("[data-chart=alarms]")
    for selector in ON_THE_FIRST_SCREEN:
        box = page.locator(selector).bounding_box()
        assert box["width"] > 100, selector
        assert box["height"] > 15, selector
        assert box["x"] >= 0, selector
        assert box["x"] + box["width"] <= DESK[0], selector
        assert box["y"] + box["height"] <= DESK[1], (selector, box)
    assert page.evaluate("document.documentElement.scrollWidth") <= DESK[0]


@pytest.mark.parametrize("name", ["thousand", "broken", "hostile", "empty"])
def test_nothing_overflows_on_a_phone(open_page, report_of, name):
    page = open_page(report_of(name), PHONE)
    page.wait_for_selector("[data-chart=alarms]")
    views = ["#overview", "#episodes", "#config"]
    best = page.locator(".pick.best")
    if best.count():
        reference = best.get_attribute("href")
        views += [reference.split("/")[0], reference, f"{reference}/5"]
    for view in views:
        page.evaluate("(hash) => { location.hash = hash; }", view)
        page.wait_for_function("(hash) => location.hash === hash", arg=view)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], view
    assert page.locator("[data-chart]").evaluate_all("(all) => new Set(all.map((one) => one.offsetLeft)).size") == 1


def test_every_chart_draws_its_lines(open_page, report_of):
    page = open_page(report_of("thousand"))
    for chart in ("success", "reward", "mismatch", "entropy", "gradient"):
        lines = page.locator(f"[data-chart={chart}] path.js-line")
        lines.first.wait_for()
        longest = max(len(line) for line in lines.evaluate_all("(all) => all.map((one) => one.getAttribute('d'))"))
        assert longest > (500 if chart != "success" else 50), chart
        assert page.locator(f"[data-chart={chart}] .words").inner_text().count("ealthy") >= 1
    assert page.locator("[data-chart=success] .errorbar").count() == 4
    band = page.locator("[data-chart=mismatch] .shapelayer path")
    assert band.count() == 2, "the stage's boundary and the healthy band"
    assert page.locator(".modebar-btn").count() == 0


def test_every_evaluation_stands_in_a_table(open_page, report_of):
    page = open_page(report_of("thousand"))
    table = page.locator("[aria-label=Evaluations]")
    heads = [text.lower() for text in table.locator("thead th").all_inner_texts()]
    assert heads[1:] == ["training step", "tasks", "success", "reward", "pass@1", "pass@4"]
    assert table.locator("tbody th").all_inner_texts() == ["initial", "step 250", "step 500", "final"]
    last = [text.replace("\u00a0", " ") for text in table.locator("tbody tr").last.locator("td").all_inner_texts()]
    assert last[:2] == ["1,200", "512"]
    assert last[2].startswith("96.1 % (")
    assert last[5].startswith("100")


def test_one_pointer_moves_through_all_charts(open_page, report_of):
    page = open_page(report_of("thousand"))
    page.wait_for_selector("[data-chart=gradient] path.js-line", state="attached")
    newest = page.locator("[data-chart=entropy] .value").inner_text()
    box = page.locator("[data-chart=reward] .chart").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    assert page.locator(".hair:not([hidden])").count() == 6
    where = page.locator(".where").inner_text()
    step = int(re.match(r"reinforcement step ([\d,]+) · training step", where)[1].replace(",", ""))
    assert 300 < step < 700
    assert page.locator("[data-chart=entropy] .value").inner_text() != newest
    page.locator("[data-chart=reward] .chart").focus()
    page.keyboard.press("ArrowRight")
    assert f"step {step + 1:,}" in page.locator(".where").inner_text()
    page.mouse.move(5, 5)
    page.locator(".pick.best").focus()
    assert page.locator(".hair:not([hidden])").count() == 0
    assert page.locator("[data-chart=entropy] .value").inner_text() == newest


def test_stages_and_scales_can_be_chosen(open_page, report_of):
    page = open_page(report_of("thousand"))
    ticks = page.locator("[data-chart=entropy] .xtick")
    ticks.first.wait_for()
    everything = ticks.all_text_contents()
    page.get_by_role("button", name="warm start").click()
    assert ticks.all_text_contents() != everything
    assert "1,000" not in ticks.all_text_contents()
    page.get_by_role("button", name="All", exact=True).click()
    assert ticks.all_text_contents() == everything
    before = page.locator("[data-chart=gradient] .ytick").all_text_contents()
    page.locator("[data-chart=gradient] .scale-toggle").click()
    assert page.locator("[data-chart=gradient] .ytick").all_text_contents() != before


def test_the_verdict_leads_to_the_first_bad_step(open_page, report_of):
    page = open_page(report_of("broken"))
    link = page.locator(".verdict .first-bad")
    assert "bad" in page.locator(".verdict").get_attribute("class")
    step = re.search(r"\d+", link.inner_text())[0]
    link.click()
    assert page.locator(".reader h2").inner_text() == f"Step {step}"
    assert page.locator(".group").count() >= 1
    page.go_back()
    assert page.locator("#view-overview").is_visible()
    broken = page.locator(".invariant.broken")
    assert any("every number finite" in text for text in broken.all_inner_texts())
    marks = page.locator(".alarm-mark")
    assert marks.count() == 3
    marks.first.focus()
    assert (
        "not a number" in page.locator(".alarm-words").inner_text()
        or "nan" in page.locator(".alarm-words").inner_text()
    )


def test_a_run_without_anything_says_so(open_page, report_of):
    page = open_page(report_of("empty"))
    text = page.locator("#view-overview").inner_text()
    for said in ("No evaluation yet", "No step has been rewarded yet", "No step has been watched yet"):
        assert said in text
    page.get_by_role("link", name="Episodes").click()
    assert "No episodes have been recorded" in page.locator(".reader").inner_text()


def test_charts_follow_the_size_and_the_colours_of_the_page(open_page, report_of):
    page = open_page(report_of("crashed"))
    line = page.locator("[data-chart=reward] path.js-line").last
    colour = "(one) => getComputedStyle(one).stroke"
    light = line.evaluate(colour)
    page.evaluate("location.hash = '#episodes'")
    page.set_viewport_size({"width": 800, "height": 900})
    page.emulate_media(color_scheme="dark")
    page.evaluate("location.hash = '#overview'")
    page.wait_for_function(
        "() => document.querySelector('[data-chart=reward] .main-svg').clientWidth"
        " === document.querySelector('[data-chart=reward] .chart').clientWidth"
    )
    assert line.evaluate(colour) != light
    page.evaluate("location.hash = '#config'")
    page.set_viewport_size({"width": 1200, "height": 900})
    page.evaluate("location.hash = '#overview'")
    page.wait_for_function(
        "() => document.querySelector('[data-chart=reward] .main-svg').clientWidth"
        " === document.querySelector('[data-chart=reward] .chart').clientWidth"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_what_is_behind_them(open_page, report_of, dark):
    page = open_page(report_of("empty"), dark=dark)
    backs = ["--card", "--page", "--sunken"]
    pairs = [[front, back] for front in ("--text", "--muted", "--accent") for back in backs]
    pairs += [[f"--{kind}", f"--{kind}-soft"] for kind in ("good", "warn", "bad")]
    pairs += [["--on-accent", "--accent"], ["--high-text", "--card"], ["--good", "--card"], ["--bad", "--card"]]
    contrasts = page.evaluate(CONTRAST, pairs)
    low = {tuple(pair): round(found, 2) for pair, found in zip(pairs, contrasts, strict=True) if found < 4.5}
    assert not low
    assert (page.evaluate(CONTRAST, [["--page", "--text"]])[0] > 12) is True
    bright = page.evaluate("getComputedStyle(document.body).color")
    assert (int(re.findall(r"\d+", bright)[0]) > 128) is dark
