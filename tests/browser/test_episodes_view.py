"""Reading: steps, groups, conversations and tokens; filters, links, and the way back."""

from __future__ import annotations

import re

import pytest

from tests.browser.conftest import PHONE

pytestmark = pytest.mark.browser

STREAMS = [
    "token id", "place", "origin", "turn", "segment", "version", "rollout log-prob", "old log-prob", "log-prob",
    "ratio", "mismatch", "importance weight", "advantage", "entropy", "mask reason", "bytes",
]  # fmt: skip
COLOURINGS = ["origin", "mismatch", "importance_weight", "advantage", "entropy", "mask_reason"]


@pytest.fixture
def episode(open_page, report_of):
    """The page with the best episode of a crashed run open."""
    page = open_page(report_of("crashed"))
    page.locator(".pick.best").click()
    page.locator(".token").first.wait_for()
    return page


def stream(page, name):
    return page.locator(f"dd[data-stream='{name}']").inner_text()


def test_an_episode_shows_its_conversation_beside_its_tokens(episode):
    roles = episode.locator(".conversation .message header b").all_inner_texts()
    assert roles == ["user", "assistant", "tool", "assistant"]
    left, right = (episode.locator(selector).bounding_box() for selector in (".conversation", ".token-card"))
    assert left["x"] + left["width"] <= right["x"]
    spoken = "".join(episode.locator(".run-drawn .token").all_inner_texts())
    assert '"expression"' in spoken.replace("·", "")
    assert episode.locator(".run-name").all_inner_texts() == [
        "context",
        "policy · turn 0",
        "context",
        "policy · turn 1",
    ]


def test_every_colouring_paints_tokens_and_counts_them(episode):
    total = episode.locator(".token").count()
    seen = set()
    for key in COLOURINGS:
        episode.locator(f".token-head button[data-value={key}]").click()
        assert episode.locator(f".token-head button[data-value={key}]").get_attribute("aria-pressed") == "true"
        counts = [int(text.replace(",", "")) for text in episode.locator(".legend li > :last-child").all_inner_texts()]
        assert sum(counts) == total, key
        paints = episode.locator(".token").evaluate_all(
            "(all) => all.map((one) => getComputedStyle(one).backgroundColor)"
        )
        assert len(set(paints)) >= 2, key
        seen.add((tuple(paints), tuple(episode.locator(".legend li > :nth-child(2)").all_inner_texts())))
    assert len(seen) == len(COLOURINGS)


def test_hovering_and_focusing_a_token_gives_every_stream(episode):
    drawn = episode.locator(".run-drawn .token").nth(3)
    drawn.hover()
    values = {name: stream(episode, name) for name in STREAMS}
    assert episode.locator("dd[data-stream]").count() == len(STREAMS)
    assert all(values.values())
    assert values["origin"] == "policy"
    assert values["turn"] == "0"
    assert values["mask reason"] == "trained on"
    assert values["ratio"] == "1"
    assert float(values["rollout log-prob"].replace("−", "-").split("×")[0]) <= 0
    text = bytes.fromhex(values["bytes"]).decode("utf-8", "replace")
    assert text.strip() == drawn.inner_text().replace("·", "").strip()
    episode.locator(".run-context .token").first.focus()
    assert stream(episode, "origin") == "context"
    assert stream(episode, "place").startswith("0 of ")
    episode.keyboard.press("ArrowRight")
    assert stream(episode, "place").startswith("1 of ")


def test_links_lead_to_a_token_and_back(episode, open_page, report_of):
    start = episode.url
    episode.locator(".token").nth(7).click()
    assert episode.url == f"{start}/7"
    assert stream(episode, "place").startswith("7 of ")
    episode.locator(".token").nth(30).click()
    assert episode.locator(".token[aria-selected=true]").get_attribute("data-index") == "30"
    episode.go_back()
    episode.wait_for_function("() => document.querySelector('.token[aria-selected=true]')?.dataset.index === '7'")
    episode.go_back()
    episode.go_back()
    assert episode.locator("#view-overview").is_visible()
    episode.go_forward()
    episode.locator(".token").first.wait_for()
    other = open_page(f"{start}/30")
    assert other.locator(".token[aria-selected=true]").get_attribute("data-index") == "30"
    assert stream(other, "place").startswith("30 of ")


def test_on_a_phone_the_streams_do_not_cover_their_token(open_page, report_of):
    page = open_page(report_of("crashed"), PHONE)
    page.locator(".pick.best").click()
    page.locator(".token").first.wait_for()
    for index in (3, page.locator(".token").count() - 1):
        page.locator(".token").nth(index).dispatch_event("click")
        page.locator(f".token[aria-selected=true][data-index='{index}']").wait_for()
        token, details = (page.locator(one).bounding_box() for one in (".token[aria-selected=true]", ".token-details"))
        assert token["y"] >= 0
        assert token["y"] + token["height"] <= details["y"] + 1
        assert details["y"] + details["height"] <= PHONE[1] + 1


def test_the_turn_of_a_message_leads_to_its_tokens(episode):
    episode.get_by_role("button", name="turn 1").click()
    episode.locator(".token[aria-selected=true]").wait_for()
    assert stream(episode, "turn") == "1"
    assert stream(episode, "origin") == "policy"


def test_attempts_of_a_group_stand_side_by_side(episode):
    episode.locator(".reader-title a", has_text="Step").click()
    group = episode.locator(".group").first
    group.get_by_role("button", name="Side by side").click()
    lanes = group.locator(".attempt-lane")
    assert lanes.count() == group.locator(".chip").count() >= 2
    tops = lanes.evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().top)")
    assert len(set(tops)) == 1
    assert episode.evaluate("document.documentElement.scrollWidth") <= 1440
    lanes.nth(1).get_by_role("link").click()
    assert episode.locator(".reader h2").inner_text().startswith("Attempt")


def test_neighbouring_attempts_and_steps_are_one_click_away(episode):
    first = episode.locator(".reader-head .chip[aria-current]").get_attribute("href")
    episode.locator("a.arrow").first.click()
    episode.wait_for_function(
        "(first) => document.querySelector('.chip[aria-current]')?.getAttribute('href') !== first", arg=first
    )
    episode.locator(".reader-title a", has_text="Step").click()
    step = episode.locator(".reader h2").inner_text()
    episode.locator("a.arrow").first.click()
    episode.wait_for_function("(step) => document.querySelector('.reader h2').textContent !== step", arg=step)


def test_filters_leave_what_they_say(open_page, report_of):
    page = open_page(f"{report_of('thousand').as_uri()}#episodes")
    rows = page.locator(".attempt-row")
    summary = page.locator(".list-summary")

    def count():
        return int(re.match(r"([\d,]+) attempt", summary.inner_text())[1].replace(",", ""))

    steps = page.locator(".step-row").count()
    assert steps > 100
    page.get_by_label("Success").select_option("no")
    rows.first.wait_for()
    wrong = count()
    assert set(rows.locator(".pill").all_inner_texts()) == {"✕ reward 0", "✕ reward –"}, "a failed world has no reward"
    page.get_by_label("Success").select_option("yes")
    page.wait_for_function("() => document.querySelector('.attempt-row .pill').textContent.includes('✓')")
    right = count()
    total = int(re.search(r"of the ([\d,]+)", summary.inner_text())[1].replace(",", ""))
    assert wrong + right == total
    page.get_by_label("Success").select_option("")
    page.get_by_label("Status").select_option("env_error")
    page.wait_for_function("() => document.querySelector('.attempt-row .pill').textContent.includes('–')")
    failed = count()
    page.get_by_label("Status").select_option("completed")
    page.wait_for_function("() => !document.querySelector('.attempt-row .pill').textContent.includes('–')")
    assert count() == total - failed
    page.get_by_label("Reward from").fill("0.5")
    page.wait_for_function("() => !document.querySelector('.step-list').textContent.includes('✕')")
    rewarded = count()
    assert right - failed <= rewarded <= right
    page.get_by_label("malformed only").check()
    page.wait_for_function(
        "(all) => !document.querySelector('.list-summary').textContent.startsWith(all)", arg=f"{rewarded:,} attempt"
    )
    assert 0 < count() < rewarded
    page.get_by_role("button", name="clear filters").click()
    assert page.locator(".step-row").count() == steps
    page.get_by_label("Search").fill("calculator is out")
    page.wait_for_function("() => document.querySelector('.attempt-row') !== null")
    assert count() == failed
    rows.first.click()
    assert "calculator is out" in page.locator(".error-note").inner_text()
    assert "left before the batch" in page.locator(".token-card").inner_text()
    page.get_by_label("Search").fill("no such words anywhere")
    page.get_by_text("Nothing matches.").wait_for()
    page.get_by_role("button", name="clear filters").click()
    page.get_by_label("Stage").select_option("warm_start")
    page.wait_for_function("() => !document.querySelector('.step-list').textContent.includes('step 999')")
    assert page.locator(".step-row").count() == 200


def test_what_is_not_here_is_said(open_page, report_of):
    page = open_page(f"{report_of('crashed').as_uri()}#99999")
    assert "Step 99999 is not in this page" in page.locator(".reader").inner_text()
    page.evaluate("location.hash = '#137/99999'")
    page.get_by_text("Episode 99999 of step 137 is not in this page").wait_for()
    page.get_by_role("link", name="Config").click()
    assert "[rollout]" in page.locator(".config-text").inner_text()
