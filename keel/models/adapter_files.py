"""Directories that hold an adapter instead of weights: PEFT's own format, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keel.types import UserFault

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class AdapterError(UserFault, ValueError):
    """An adapter cannot be put on, taken from its files, or trained as asked; says what, got and how to fix."""


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is a directory with an adapter in it."""
    return Path(path, ADAPTER_CONFIG).is_file()


def base_model(path: str | Path, revision: str = "") -> tuple[str, str]:
    """`path` and `revision` themselves, or, if an adapter lies at `path`, those of the model it belongs on.

    Raises AdapterError if the adapter does not name its base, or names a directory that is gone.
    """
    if not is_adapter(path):
        return str(path), revision
    config = read_adapter_config(path)
    named = config.get("base_model_name_or_path")
    where = f"{Path(path, ADAPTER_CONFIG)}: base_model_name_or_path"
    if not isinstance(named, str) or not named:
        raise AdapterError(f"{where} is {named!r}; set it to the model that the adapter was trained on")
    if Path(named).is_absolute() and not Path(named).is_dir():
        raise AdapterError(
            f"{where} is {named}, and there is no such directory; put the base model back there, or set the path to "
            "where it is now"
        )
    return named, str(config.get("revision") or "")


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """The fields of the adapter's configuration. Raises AdapterError if it cannot be read."""
    file = Path(path, ADAPTER_CONFIG)
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read ({error}); write the adapter anew") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{file} is not a table of options; write the adapter anew")
    return values
