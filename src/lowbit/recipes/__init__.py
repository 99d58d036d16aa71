"""Recipes: what is stored and the steps that choose it; the registry of methods; mixes; recipe files."""

from lowbit.catalog import builtin_recipes
from lowbit.recipes.files import as_recipe, from_file, from_plain
from lowbit.recipes.mix import mix
from lowbit.recipes.recipe import Recipe, rebuilt
from lowbit.recipes.registry import ALIASES, METHODS, Method, method, recipe

__all__ = [
    "ALIASES",
    "METHODS",
    "Method",
    "Recipe",
    "as_recipe",
    "builtin_recipes",
    "from_file",
    "from_plain",
    "method",
    "mix",
    "rebuilt",
    "recipe",
]
