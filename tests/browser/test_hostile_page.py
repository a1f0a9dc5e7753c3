"""Texts that try to be more than text, everywhere a page shows one: they are read, and nothing else happens."""

from __future__ import annotations

import pytest

from tests.hostile import HOSTILE, MARK

pytestmark = pytest.mark.browser

INTRUDERS = (
    "img, iframe, object, embed, base, link, video, audio, template, textarea, meta[http-equiv=refresh], #" + MARK
)
HANDLERS = "(all) => all.flatMap((one) => [...one.attributes]).filter((one) => one.name.startsWith('on')).length"
ADDRESSES = "(all) => all.map((one) => one.getAttribute('href')).filter((one) => !/^#[a-z0-9/]+$/.test(one))"
BARE = r"""() => {
  const unseen = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u202a-\u202e\u2066-\u2069\ufeff]/;
  const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) if (unseen.test(walker.currentNode.data)) found.push(walker.currentNode.data.slice(0, 80));
  return found;
}"""


def assert_nothing_happened(page):
    assert page.locator(INTRUDERS).count() == 0
    assert page.locator("*").evaluate_all(HANDLERS) == 0
    assert page.locator("a").evaluate_all(ADDRESSES) == []
    assert page.locator("script").count() == 3
    assert page.evaluate(f"typeof window.{MARK}") == "undefined"
    assert page.evaluate(f"Object.prototype.{MARK}") is None
    assert MARK not in page.title()
    assert page.evaluate(BARE) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_hostile_texts_are_shown_and_do_nothing(open_page, report_of):
    page = open_page(report_of("hostile"))
    assert_nothing_happened(page)
    for mark in page.locator(".alarm-mark").all():
        mark.focus()
    page.locator(".verdict-notes > li > details > summary").last.click()
    assert_nothing_happened(page)
    page.evaluate("location.hash = '#episodes'")
    page.locator("a.step-row").first.click()
    page.get_by_role("button", name="Side by side").first.wait_for()  # `all` does not wait for the step to be drawn
    for button in page.get_by_role("button", name="Side by side").all():
        button.click()
    assert_nothing_happened(page)
    shown = page.locator(".reader").inner_text()
    for name in ("script_end", "image_handler", "rich_markup", "template"):
        assert HOSTILE[name] in shown, name
    assert "‹ESC›" in shown
    assert "‹U+202E›" in shown
    page.get_by_role("link", name="Config").click()
    assert_nothing_happened(page)


def test_every_hostile_episode_can_be_read(open_page, report_of):
    page = open_page(f"{report_of('hostile').as_uri()}#episodes")
    page.locator("a.step-row").first.click()
    page.locator(".chip").first.wait_for()
    places = page.locator(".chip").evaluate_all("(all) => all.map((one) => one.getAttribute('href'))")
    assert len(places) >= 40
    for place in places:
        page.evaluate("(place) => { location.hash = place; }", place)
        page.wait_for_function(
            "(place) => document.querySelector('.chip[aria-current]')?.getAttribute('href') === place", arg=place
        )
        tokens = page.locator(".token")
        if tokens.count():
            tokens.nth(min(tokens.count() - 1, 25)).hover()
        page.locator(".show-all").evaluate_all("(all) => all.forEach((button) => button.click())")
        assert page.evaluate(f"typeof window.{MARK}") == "undefined"
    assert_nothing_happened(page)


def test_a_huge_text_is_clipped_until_it_is_asked_for(open_page, report_of):
    page = open_page(f"{report_of('hostile').as_uri()}#episodes")
    page.get_by_label("Search").fill(f"<b>{MARK}</b>")
    page.locator(".attempt-row").first.click()
    content = page.locator(".conversation .content").first
    content.wait_for()
    assert len(content.inner_text()) < 6_000
    content.locator(".show-all").click()
    assert len(content.inner_text()) > 15_000
    assert_nothing_happened(page)


def test_markup_that_got_into_the_page_could_start_nothing(open_page, report_of):
    page = open_page(report_of("hostile"))
    page.evaluate(
        """() => {
          const box = document.createElement('div');
          box.innerHTML = '<button id=t onclick="window.pwned=1">x</button><img src=x onerror="window.pwned=1">';
          document.body.prepend(box);
          const script = document.createElement('script');
          script.textContent = 'window.pwned=1';
          document.body.append(script);
        }"""
    )
    page.locator("#t").click()
    page.wait_for_function("() => window.violations.length >= 3")
    assert page.evaluate(f"typeof window.{MARK}") == "undefined"
    assert all(line.startswith(("script-src", "img-src")) for line in page.evaluate("window.violations"))
    page.evaluate("window.violations.length = 0")
    page.watch.said.clear()


def test_hostile_texts_in_a_comparison_do_nothing(open_page, comparison_of):
    page = open_page(comparison_of("hostile", "other_seed"))
    page.locator("path.js-line").first.wait_for()
    assert_nothing_happened(page)
