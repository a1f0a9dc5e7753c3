"""Runs that ship with Keel: a recipe's bare name may stand wherever the path of a TOML file may."""

from __future__ import annotations

from importlib.resources import files

SUFFIX = ".toml"


def recipe_names() -> tuple[str, ...]:
    """The names of all recipes, in order."""
    found = (item.name for item in files("keel.recipes").iterdir())
    return tuple(sorted(name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX)))


def recipe_text(name: str) -> str | None:
    """The TOML of recipe `name`, or None if there is none such."""
    if name not in recipe_names():
        return None
    return files("keel.recipes").joinpath(name + SUFFIX).read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """The first line of a recipe, which says what it is for."""
    first = (recipe_text(name) or "").partition("\n")[0]
    return first.removeprefix("#").strip()
