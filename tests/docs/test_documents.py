"""Every code block of the documents runs, and the pages made from code are current.

A page's blocks share a directory and run from top to bottom. `python` blocks share their names, `toml` blocks must be
configs, `sh` blocks run in bash, `text` is output. HTML comments before a block say more:

    <!-- file: run.toml -->      the block is also written to that file, for the blocks after it
    <!-- checked, not run -->    a command that takes minutes: its target or its options are checked instead
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from keel.config_docs import as_markdown
from keel.config_load import parse

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RUN_HERE = [page for page in PAGES if page.name != "first-hour.md"]  # tests/first_hour runs it, from the wheel
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
NOT_RUN = "checked, not run"


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    note: str
    line: int


def blocks_of(text: str) -> list[Block]:
    return [
        Block(found["language"], found["text"], found["note"] or "", text.count("\n", 0, found.start("text")))
        for found in BLOCK.finditer(text)
    ]


class Runner:
    """Runs the blocks of one page in `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.names: dict[str, object] = {"__name__": "__page__"}
        tools = place / ".tools"
        tools.mkdir()
        keel = tools / "keel"
        # As an installed command: with -c or a script, unlike with -m, Python leaves the working directory out.
        keel.write_text(f"#!{sys.executable} -P\nfrom keel.cli import main\n\nmain()\n")
        keel.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def run(self, block: Block) -> None:
        if block.note.startswith("file: "):
            (self.place / block.note.removeprefix("file: ")).write_text(block.text)
        if block.language == "python":
            exec(compile(block.text, f"block at line {block.line}", "exec"), self.names)
        elif block.language == "toml":
            parse(block.text, f"block at line {block.line}")
        elif block.language == "sh":
            commands = block.text if block.note != NOT_RUN else "\n".join(self.checked(block))
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", commands],
                cwd=self.place,
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"line {block.line}: {block.text}\n{done.stdout}\n{done.stderr}"
        else:
            assert block.language == "text", f"line {block.line}: a block of {block.language!r} cannot be run"

    def checked(self, block: Block):
        """What stands in for commands that take too long: a dry make, or the command's help naming its options."""
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "make":
                yield f"make --dry-run --directory {shlex.quote(str(ROOT))} {shlex.join(words[1:])}"
            elif words[0] == "keel":
                yield f"keel {shlex.quote(words[1])} --help > help"
                yield from (f"grep -q -- {shlex.quote(word)} help" for word in words if word.startswith("--"))
            else:
                assert words[0] in ("git", "cd", "pip"), f"line {block.line}: cannot check {line!r}"


@pytest.mark.parametrize("page", RUN_HERE, ids=[str(page.relative_to(ROOT)) for page in RUN_HERE])
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # where a page's own modules lie, as for the installed command
    runner = Runner(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks_of(text)), "a block of another form than ```language ... ```"
    before = set(sys.modules)
    try:
        for block in blocks_of(text):
            runner.run(block)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]  # another page may have a file of the same name


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_page_of_options_is_current():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == as_markdown(), "run: make docs"


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert 1 == 2\n```\n",
        "```toml\n[rollout]\ngroup_sise = 3\n```\n",
        "```sh\nfalse\n```\n",
        "```sh\nkeel --no-such-option\n```\n",
        "<!-- checked, not run -->\n```sh\nmake no-such-target\n```\n",
        "<!-- checked, not run -->\n```sh\nkeel quickstart --no-such-option\n```\n",
        "<!-- checked, not run -->\n```sh\nkeel no-such-command\n```\n",
        "<!-- checked, not run -->\n```sh\nfrobnicate\n```\n",
        "```rust\nfn main() {}\n```\n",
    ],
)
def test_a_broken_block_is_found(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of(text)
    with pytest.raises((AssertionError, ValueError)):
        Runner(tmp_path).run(block)


def test_blocks_hand_files_and_names_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # where a page's own modules lie, as for the installed command
    runner = Runner(tmp_path)
    text = (
        "<!-- file: run.toml -->\n```toml\nseed = 3\n```\n```sh\ngrep -q 'seed = 3' run.toml\n```\n"
        "```python\nx = 1\n```\n```python\nassert x == 1\n```\n<!-- checked, not run -->\n\n```sh\nmake test\n```\n"
    )
    blocks = blocks_of(text)
    assert [block.language for block in blocks] == ["toml", "sh", "python", "python", "sh"]
    for block in blocks:
        runner.run(block)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_figure_is_still_to_be_filled_in(page):
    placeholders = re.findall(r"^[A-Z]+(?:_[A-Z]+)+$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert not placeholders
