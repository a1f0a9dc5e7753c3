"""docs/config.md, made from the schema (`make docs`); a test says whether the page is current."""

from __future__ import annotations

from keel.config_schema import Table, tables

HEAD = """\
# Every option

This page is made from `keel/config.py` by `make docs`. `keel config` prints the same as a TOML file with all defaults;
a run's `config.toml` is such a file with every option resolved, and a valid input.

Any option can be set on the command line, in TOML syntax, quotes around a plain word left out:

<!-- checked, not run -->
```sh
keel train run.toml --set rollout.group_size=8 --set algo.loss.clip_high=0.28
```

A plug-in (`algo.advantage`, `algo.loss`, `algo.correction`, ...) is a built-in's name, or `package.module:name` of your
own function; its keyword-only arguments are its options:

```toml
[algo]
advantage = "leave_one_out"
loss = { id = "ppo_clip", clip_low = 0.2, clip_high = 0.28 }
```
"""


def as_markdown() -> str:
    """The page."""
    return "\n".join([HEAD, *(_section(table) for table in tables())])


def _section(table: Table) -> str:
    title = f"## [{'.'.join(table.path)}]" if table.path else "## Top of the file"
    lines = [title, ""]
    if table.help:
        lines += [f"{table.help[0].upper()}{table.help[1:]}.", ""]
    lines += ["| option | default | takes | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{option.path[-1]}` | `{option.default}` | {_cell(option.needs)} | {_cell(option.help)} |"
        for option in table.options
    ]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
