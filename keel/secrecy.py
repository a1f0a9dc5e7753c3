"""No key, token or password is written to disk: values that look like one are taken out of whatever Keel writes.

Two kinds are known: values of environment variables whose names say that they are secret (and Hugging Face's token
file), wherever they turn up, and texts in the forms that well-known services give their keys.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keel.types import UserFault

_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:(?:api|access|secret|private|auth|signing|encryption)_?key|secrets?|passw(?:or)?d|passphrase"
    r"|(?:api|auth|access|bearer|refresh|hf|hub|github|gh|gitlab|session|bot|deploy)_?token|credentials?|bearer)"
    r"(?:$|[_.-])|^token$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"_(?:token|key|pat|pwd|dsn|private|auth)$", re.IGNORECASE)
_NOT_SECRET_NAME = re.compile(
    r"(?:_|^)(?:file|path|dir|env|var|variable|name|column|sock|command|cmd|askpass)$", re.IGNORECASE
)
_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic and those who follow them
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"  # user:password@ of an address
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/-]{16,}=*"
)
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")  # the name of a variable is no secret: OPENAI_API_KEY
_SHORTEST = 8  # a shorter value would be taken out of half of all texts
_SHORTEST_WORD = 16  # letters alone: "reinforcement" or "group_id" is no secret, whatever variable holds it


class SecretError(UserFault, ValueError):
    """The config holds what looks like a secret, and would be written to the run directory."""


def scrubbed(text: str) -> str:
    """`text` with every secret replaced by a word in brackets that says whose it was."""
    return _scrubber()(text)


def scrubbed_values(value: Any) -> Any:
    """A JSON value with the secrets taken out of its texts, keys included."""
    return _walk(value, _scrubber())


def _scrubber() -> Callable[[str], str]:
    known = _known(_environment(), _token_file())
    if known is None:
        return lambda text: _FORMS.sub("[secret]", text)
    pattern, names = known
    return lambda text: _FORMS.sub("[secret]", pattern.sub(lambda found: f"[secret {names[found[0]]}]", text))


def _walk(value: Any, scrub: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrub(key) if isinstance(key, str) else key: _walk(item, scrub) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk(item, scrub) for item in value]
    return value


def refuse_secrets(config: Mapping[str, Any]) -> None:
    """Raise SecretError if an option's name says that it is a secret, or its value looks like one.

    A config is written to the run directory and read again to resume, so a secret in it can neither stay nor go.
    """
    for path, value in _texts(config, ()):
        named = _names_secret(path[-1]) and _is_secret_value(value) and not _VARIABLE.fullmatch(value)
        if named or scrubbed(value) != value:
            name = ".".join(path)
            raise SecretError(
                f"{name} looks like a secret, and a config is written to the run directory; got a text of "
                f"{len(value)} characters; put it into an environment variable and let the code that needs it read "
                f'that: os.environ["{path[-1].upper()}"]'
            )
    if scrubbed_values(config) != _walk(config, str):
        raise SecretError(
            "the name of an option looks like a secret, and a config is written to the run directory; give it another"
        )


def _names_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET_NAME.search(name)


def _texts(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, (*path, str(name)))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, path)


def _environment() -> tuple[tuple[str, str], ...]:
    """Secret variables, name and value. Read anew each time: a notebook sets them when it needs them."""
    return tuple(
        (name, value.strip())
        for name, value in os.environ.items()
        if (_names_secret(name) or _SECRET_VARIABLE.search(name)) and _is_secret_value(value.strip())
    )


def _is_secret_value(value: str) -> bool:
    is_word = value.replace("_", "").isalpha()
    if len(value) < (_SHORTEST_WORD if is_word else _SHORTEST) or value.replace(".", "").isdecimal():
        return False
    return not (value.startswith(("/", "~")) and Path(value).expanduser().exists())


def _token_file() -> str:
    """What `hf auth login` wrote, if it did."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return _read_token(str(Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()))


@functools.cache
def _read_token(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@functools.lru_cache(maxsize=4)
def _known(variables: tuple[tuple[str, str], ...], token: str) -> tuple[re.Pattern[str], dict[str, str]] | None:
    """A pattern of all known values, as they are and as JSON and TOML spell them, and whose each is."""
    names: dict[str, str] = {}
    for name, value in (*variables, ("HF_TOKEN", token)):
        if len(value) >= _SHORTEST:
            for spelled in (
                value,
                json.dumps(value)[1:-1],
                json.dumps(value, ensure_ascii=False)[1:-1],
                repr(value)[1:-1],
            ):
                names.setdefault(spelled, name)
    if not names:
        return None
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))), names
