"""A real browser before the report's pages. Every test that opens one also asks for a quiet one: see `Watch`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from keel.report.compare import compare_data
from keel.report.plain import to_json
from keel.report.write import page as filled
from keel.report.write import write_report
from tests.report_runs import held, write_named

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESK = (1440, 900)
PHONE = (390, 844)
ASK_VIOLATIONS = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) =>
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""


@dataclass
class Watch:
    """What a page must not do: say an error, open a dialog, ask the network for anything but itself."""

    page: Any
    said: list[str] = field(default_factory=list)

    def listen(self) -> None:
        self.page.on("console", lambda one: self.said.append(one.text) if one.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("popup", lambda other: self.said.append(f"popup: {other.url}"))
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file://", "http://127.0.0.1:", "data:", "blob:")):
            self.said.append(f"request: {request.url}")

    def complaints(self) -> list[str]:
        return self.said if self.page.is_closed() else [*self.said, *self.page.evaluate("window.violations")]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium by its name on PATH."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(f"no browser: none of {', '.join(BROWSERS)} is on PATH; on Debian `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(address, size=DESK, dark=False)`; at the end of the test every page opened must have been quiet.

    A test that breaks the policy on purpose empties `page.watch.said` and `window.violations` itself.
    """
    watches: list[Watch] = []
    contexts = []

    def open_(address: str | Path, size: tuple[int, int] = DESK, *, dark: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
        )
        context.set_default_timeout(10_000)
        contexts.append(context)
        opened = context.new_page()
        opened.add_init_script(ASK_VIOLATIONS)
        watch = Watch(opened)
        watch.listen()
        watches.append(watch)
        opened.watch = watch  # type: ignore[attr-defined]
        opened.goto(address.as_uri() if isinstance(address, Path) else address)
        return opened

    yield open_
    complaints = [watch.complaints() for watch in watches]
    for context in contexts:
        context.close()
    assert not any(complaints), complaints


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`run_directory("crashed")`: a synthetic run of that name, written once."""
    out = tmp_path_factory.mktemp("runs")
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            made[name] = write_named(out, name)
        return made[name]

    return build


@pytest.fixture(scope="session")
def report_of(run_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`report_of("crashed")`: its report as a file, written once; few recorded steps, to be quick."""
    out = tmp_path_factory.mktemp("reports")
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            run = run_directory(name)
            if name == "running":
                with held(run):
                    made[name] = write_report(run, out / f"{name}.html", max_steps=4)
            else:
                made[name] = write_report(run, out / f"{name}.html", max_steps=4)
        return made[name]

    return build


@pytest.fixture(scope="session")
def comparison_of(
    run_directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """`comparison_of("crashed", "other_seed")`: what sets the two apart, as a page."""

    def build(first: str, second: str) -> Path:
        path = tmp_path_factory.mktemp("comparison") / "compare.html"
        data = to_json(compare_data(run_directory(first), run_directory(second)))
        path.write_text(filled("compare.html", data), encoding="utf-8")
        return path

    return build
