"""`keel recipes`: the runs that ship with Keel."""

from __future__ import annotations

from typing import Annotated

import typer

from keel.config_recipes import recipe_names, recipe_summary, recipe_text


def recipes(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Print this one, to begin one of your own.")] = "",
) -> None:
    """List the recipes that ship with Keel; each name can be given in the place of RUN.toml."""
    if not name:
        width = max(map(len, recipe_names()))
        print("\n".join(f"{recipe:{width}}  {recipe_summary(recipe)}" for recipe in recipe_names()))
        return
    text = recipe_text(name)
    if text is None:
        raise typer.BadParameter(f"got {name!r}; known: {', '.join(recipe_names())}", param_hint="NAME")
    print(text, end="")
