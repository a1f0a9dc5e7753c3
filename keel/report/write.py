"""The page: one file that needs nothing else, and that nothing it shows can take over.

Chart library, style and script are inline; the data is one script element of type application/json, as ASCII without
`<`, `>` and `&`. A content security policy lets exactly our two scripts run, by their hashes, so that even markup that
somehow got into the page could start nothing, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from plotly.offline import get_plotlyjs

from keel.monitor.rows import write_text
from keel.report.data import report_data
from keel.report.plain import to_json
from keel.report.sampling import MAX_STEPS

PAGE = Path(__file__).parent / "page"
MAX_BYTES = 15_000_000
"""Largest page that is written, chart library (almost 5 MB) included."""
MARGIN = 200_000
REPORT_NAME = "report.html"

_PLACE = re.compile(r"\{\{([a-z]+)((?: [a-z_.]+)*)\}\}")
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)


def write_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    max_steps: int = MAX_STEPS,
) -> Path:
    """Write the report of a run to `out`, replacing it whole; returns its path.

    Without `out` it is report.html in the run directory. It has at most `max_bytes`, but for what is never left out
    (chart library and figures, some 6 MB); what was left out is stated in it. `max_steps` bounds the recorded steps
    that are read for it. Raises RunDirectoryError if `run_dir` is no run.
    """
    budget = max(0, max_bytes - MARGIN - len(page("template.html", "").encode()))
    data = report_data(run_dir, budget_bytes=budget, max_steps=max_steps)
    path = Path(out) if out is not None else Path(run_dir) / REPORT_NAME
    write_text(path, page("template.html", to_json(data)))
    return path


def page(template: str, data: str, *, live: bool = False) -> str:
    """`template` of the page's folder, filled: `data` is what `to_json` made; `live` lets it ask its own server."""
    text, parts = _parts(template)
    policy = ["default-src 'none'", f"script-src {' '.join(_hash(part) for part in parts.values())}"]
    policy += ["style-src 'unsafe-inline'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    if live:
        policy.append("connect-src 'self'")
    filling = {"csp": "; ".join(policy), "data": data}

    def fill(match: re.Match[str]) -> str:
        if match[1] == "css":
            return _files(match[2])
        return parts[match[0]] if match[0] in parts else filling[match[1]]

    return _PLACE.sub(fill, text)


@cache
def _parts(template: str) -> tuple[str, dict[str, str]]:
    """A template without its comments, and what stands for each of its places of script."""
    text = _COMMENT.sub("", (PAGE / template).read_text(encoding="utf-8"))
    parts = {}
    for match in _PLACE.finditer(text):
        if match[1] in ("plotly", "js"):
            parts[match[0]] = _script(get_plotlyjs() if match[1] == "plotly" else _files(match[2]), match[0])
    return text, parts


def _script(text: str, what: str) -> str:
    """A script as it may stand inline. Raises ValueError if it would end its element early."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as a parser of HTML reads it: the hash is of that
    if re.search(r"</script|<!--", text, re.IGNORECASE):
        raise ValueError(
            f"{what}: the script holds </script or <!--, which cannot stand inline; write it in two halves"
        )
    return text


def _files(names: str) -> str:
    return "\n".join((PAGE / name).read_text(encoding="utf-8") for name in names.split())


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def size_of(path: Path) -> str:
    """How large a file is, in megabytes, for a person."""
    return f"{path.stat().st_size / 1e6:.1f} MB"
