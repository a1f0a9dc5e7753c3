"""The served page: steps are fetched when asked for, and new rows come without the reader's place being lost."""

from __future__ import annotations

import json
import threading

import pytest

from keel.report.serve import ReportServer
from tests.report_runs import held

pytestmark = pytest.mark.browser


@pytest.fixture
def served(run_directory):
    """A run that goes on, and the server that shows it."""
    run = run_directory("running")
    with held(run):
        server = ReportServer(run)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield run, server
        server.shutdown()
        thread.join()
        server.server_close()


def add_row(run):
    """One more step, as the loop would write it."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = [one for one in rows if one.get("stage") == "reinforcement"][-1]
    row |= {
        "step": row["step"] + 1,
        "train_step": row["train_step"] + 1,
        "unix_s": row["unix_s"] + 2,
        "reward/mean": 0.125,
    }
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    status = json.loads((run / "status.json").read_text())
    status["heartbeat_unix_s"] = row["unix_s"]
    (run / "status.json").write_text(json.dumps(status))
    return row["step"]


def test_new_rows_come_and_the_place_stays(open_page, served):
    run, server = served
    page = open_page(server.address)
    value = page.locator("[data-chart=reward] .value")
    value.wait_for()
    before = value.inner_text()
    page.get_by_role("button", name="reinforcement").click()
    ticks = page.locator("[data-chart=reward] .xtick").all_text_contents()
    page.locator("[data-chart=reward] .chart").focus()
    add_row(run)
    page.wait_for_function(
        "() => document.querySelector('[data-chart=reward] .value').textContent === '0.125'", timeout=30_000
    )
    assert before != "0.125"
    assert page.locator("[data-chart=reward] .xtick").all_text_contents() == ticks
    assert page.evaluate("document.activeElement.closest('[data-chart]')?.dataset.chart") == "reward"
    assert page.get_by_role("button", name="reinforcement").get_attribute("aria-pressed") == "true"


def test_a_server_that_went_away_is_told_of(open_page, served):
    _, server = served
    page = open_page(server.address)
    page.locator("[data-chart=reward] .value").wait_for()
    server.shutdown()
    server.server_close()
    page.get_by_text("The server does not answer").wait_for(timeout=20_000)
    page.close()
    page.watch.said.clear()  # that the browser could not reach it is no fault of the page


def test_a_step_of_which_the_page_holds_a_part_is_fetched_whole(open_page, served):
    _, server = served
    page = open_page(server.address)
    partly = page.evaluate(
        """() => Object.entries(JSON.parse(document.getElementById('keel-data').textContent).steps)
          .filter(([, step]) => step.left_out > 0).map(([name]) => name)[0]"""
    )
    page.evaluate("(step) => { location.hash = step; }", partly)
    page.locator(".group").first.wait_for()
    assert page.locator(".chip").count() == 64
    assert "not in this page" not in page.locator(".reader").inner_text()


def test_a_step_that_is_not_in_the_page_is_fetched(open_page, served):
    run, server = served
    page = open_page(f"{server.address}#20")
    page.locator(".group").first.wait_for()
    assert page.locator(".chip").count() == 64
    page.locator(".chip").nth(5).click()
    page.locator(".token").nth(12).click()
    place = page.url
    selected = page.locator(".token[aria-selected=true]")
    node = selected.element_handle()
    newest = add_row(run)
    page.locator(".step-row").filter(has_text=f"step {newest}").wait_for(timeout=30_000)
    assert page.url == place
    assert node.evaluate("(one) => one.isConnected"), "the episode being read was drawn again"
    page.evaluate("location.hash = '#99998'")
    page.get_by_text("Step 99998 is not in this page").wait_for()
