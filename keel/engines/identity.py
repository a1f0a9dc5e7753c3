"""Which model a side runs: tokenizer, chat template, configuration and revision, to refuse two sides that differ.

Token ids mean nothing under another vocabulary, a prompt rendered by another template was never trained on, and a
model of another configuration computes something else from the same weights. None of it shows in a shape.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from keel.types import UserFault

# Say how a model is run or stored, not what it computes.
_INCIDENTAL = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "_experts_implementation",
        "architectures",
        "auto_map",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_SLOW_TOKENIZER = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


class IdentityError(UserFault, RuntimeError):
    """Two sides that must run one model do not; says in what they differ."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Fingerprints of what must be the same on both sides; what is empty is not known and not compared."""

    source: str  # directory or hub id, for messages
    tokenizer: str = ""  # of vocabulary, merges, normalization and added tokens
    template: str = ""  # of the chat template's text
    config: Mapping[str, str] = field(default_factory=dict)  # field -> its value as JSON
    revision: str = ""  # commit of a hub id

    def to_json(self) -> dict[str, Any]:
        """JSON values, to keep in a checkpoint."""
        return {**dataclasses.asdict(self), "config": dict(self.config)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelIdentity:
        """What `to_json` gave."""
        return cls(**values)


def identity_of(path: str | Path, *, revision: str = "", trust_remote_code: bool = False) -> ModelIdentity:
    """The identity of the model at `path`, a Hugging Face directory or hub id; its weights are not read.

    A directory without a configuration (an adapter's) or without a tokenizer says nothing of that.
    """
    files = {name: _file(path, name, revision) for name in ("config.json", "tokenizer.json", *_SLOW_TOKENIZER)}
    config: dict[str, str] = {}
    if files["config.json"] is not None:
        from transformers import AutoConfig

        read = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=trust_remote_code)
        config = _plain(read.get_text_config(decoder=True).to_dict())
    return ModelIdentity(
        source=str(path),
        tokenizer=_tokenizer_fingerprint(files),
        template=_fingerprint(_template(path, revision).encode()),
        config=config,
        revision=_commit(files["config.json"]),
    )


def differences(ours: ModelIdentity, theirs: ModelIdentity) -> list[str]:
    """In what two sides differ, in words; what one of them does not know is no difference."""
    found = []
    for name, what in (("tokenizer", "tokenizer"), ("template", "chat template"), ("revision", "revision")):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine and other and mine != other:
            found.append(f"the {what} ({mine[:12]} and {other[:12]})")
    if ours.config and theirs.config:
        for name in sorted(ours.config.keys() | theirs.config.keys()):
            mine, other = ours.config.get(name, "nothing"), theirs.config.get(name, "nothing")
            if mine != other:
                found.append(f"{name} of the configuration ({_short(mine)} and {_short(other)})")
    return found


def refuse_differences(ours: ModelIdentity, theirs: ModelIdentity, *, who: tuple[str, str], fix: str) -> None:
    """Raises IdentityError if the two differ. `who` names them, as in ("the learner", "the engine")."""
    found = differences(ours, theirs)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise IdentityError(
            f"{who[0]} ({ours.source}) and {who[1]} ({theirs.source}) are not of the same model: they differ in "
            f"{', '.join(found[:5])}{more}; {fix}"
        )


def _file(path: str | Path, name: str, revision: str) -> Path | None:
    directory = Path(path)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(str(path), name, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _template(path: str | Path, revision: str) -> str:
    """The text of the chat template, "" if there is none."""
    own = _file(path, "chat_template.jinja", revision)
    if own is not None:
        return own.read_text(encoding="utf-8")
    settings = _file(path, "tokenizer_config.json", revision)
    value = {} if settings is None else json.loads(settings.read_text(encoding="utf-8"))
    template = value.get("chat_template") or ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _tokenizer_fingerprint(files: Mapping[str, Path | None]) -> str:
    """Of what decides which ids a text becomes: not of padding and truncation, which are a caller's."""
    fast = files["tokenizer.json"]
    if fast is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(fast))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return _fingerprint(tokenizer.to_str().encode())
    slow = [path.read_bytes() for name in _SLOW_TOKENIZER if (path := files[name]) is not None]
    return _fingerprint(b"\0".join(slow))


def _plain(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in config.items()
        if name not in _INCIDENTAL and value is not None
    }


def _commit(file: Path | None) -> str:
    """The commit that a file of the hub's cache belongs to, "" for any other."""
    parts = () if file is None else file.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""


def _fingerprint(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest() if data else ""


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
