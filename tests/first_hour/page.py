"""A page that is a transcript: its commands in their order, and what each is said to print, numbers aside."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARKS = ("episode:", "c|", "p>")  # what such a line goes on with is the policy's, and may differ by machine
NUMBER = re.compile(r"\d[\d,.]*(?:e-?\d+)?")
DURATION = re.compile(r"(?:# min )?# m?s\b")


@dataclass(frozen=True)
class Command:
    """Lines for a shell, the exit status they end with, and the lines they print."""

    text: str
    exit_status: int = 0
    printed: tuple[str, ...] = ()


def read(page: Path) -> tuple[dict[str, str], list[Command]]:
    """The files a page has its reader write, and its commands."""
    files, commands = dict[str, str](), list[Command]()
    after_command = False
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        note, language, text = found["note"] or "", found["language"], found["text"]
        if note == "checked, not run":
            after_command = False
        elif note.startswith("file: "):
            files[note.removeprefix("file: ")] = text
        elif language == "sh":
            status = int(note.removeprefix("exits with ")) if note else 0
            commands.append(Command(text, status))
            after_command = True
        elif language == "text" and after_command:
            last = commands[-1]
            commands[-1] = Command(last.text, last.exit_status, tuple(text.splitlines()))
            after_command = False
    return files, commands


def plain(line: str) -> str:
    """A line with its numbers and durations made alike."""
    return " ".join(DURATION.sub("# s", NUMBER.sub("#", line)).split())


def first_missing(printed: tuple[str, ...], output: str) -> str | None:
    """The first line of a transcript that `output` does not have, after those before it; None if it has all.

    "..." alone stands for any lines, at a line's end for whatever follows.
    """
    lines = iter(map(plain, output.splitlines()))
    for line in printed:
        mark = next((mark for mark in MARKS if line.startswith(mark)), None)
        start = mark if mark is not None else line.partition("...")[0]
        exact = mark is None and "..." not in line
        wanted = plain(start)
        if wanted and not any(found == wanted if exact else found.startswith(wanted) for found in lines):
            return line
    return None
