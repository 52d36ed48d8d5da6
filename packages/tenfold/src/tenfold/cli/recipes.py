"""`tenfold recipes`: run files that plugins bring; found without importing the plugins."""

from __future__ import annotations

import argparse

from tenfold.cli.output import print_json, print_table
from tenfold.cli.parser import Actions
from tenfold.errors import EXIT_OK, ConfigError
from tenfold.registry import Recipe, load_registry

SUMMARY = "list or show the run files that plugins bring"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions; without one, recipes are listed."""
    actions = Actions(parser, default="list")
    actions.add("list", "list recipes")
    show = actions.add("show", "print a recipe's run file")
    show.add_argument("name", metavar="PLUGIN:RECIPE", help="recipe, as `tenfold recipes` lists it")


def run(args: argparse.Namespace) -> int:
    """Runs one action."""
    registry = load_registry()
    if args.action == "show":
        path = registry.recipe(args.name)
        if path is None:
            raise ConfigError(f"{args.name!r} is no recipe name; write it as plugin:recipe")
        text = path.read_text(encoding="utf-8")
        if args.json:
            print_json({"id": args.name, "path": str(path), "text": text})
        else:
            print(text.rstrip("\n"))
        return EXIT_OK
    rows = [(recipe, summary(recipe)) for recipe in registry.recipes()]
    if args.json:
        print_json([{"id": r.id, "path": str(r.path), "summary": text} for r, text in rows])
    else:
        print_table(("RECIPE", "SUMMARY"), [(recipe.id, text) for recipe, text in rows])
    return EXIT_OK


def summary(recipe: Recipe) -> str:
    """The `summary` of a recipe's run file, or why it cannot be read."""
    from tenfold.workspace import read_toml

    try:
        return str(read_toml(recipe.path).get("summary", ""))
    except ConfigError as error:
        return f"unreadable: {error}"
