"""Recipes (what is stored, and the stages that choose it), the registry of methods, mixes and recipe files."""

from lowbit.catalog import KV_FAMILY, builtin_recipes
from lowbit.recipes.files import as_recipe, from_file, from_plain
from lowbit.recipes.mix import mix
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.registry import ALIASES, METHODS, Method, kv_recipe, kv_scheme, method, recipe
from lowbit.recipes.stages import Blockwise, FitCache, Stage, Train

__all__ = [
    "ALIASES",
    "KV_FAMILY",
    "METHODS",
    "Blockwise",
    "FitCache",
    "Method",
    "Recipe",
    "Stage",
    "Train",
    "as_recipe",
    "builtin_recipes",
    "from_file",
    "from_plain",
    "kv_recipe",
    "kv_scheme",
    "method",
    "mix",
    "recipe",
]
