"""A recipe is one job: what several need is in the package."""

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


def imported(source: str) -> list[str]:
    """Full names of the modules that a file imports anywhere; relative ones begin with dots."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [f"{base}.{alias.name}" if base.endswith("recipes") else base for alias in node.names]
    return found


def other_recipes(source: str) -> set[str]:
    """Those of the imported modules that are recipes, under any of the names that they can be had by."""
    return {
        name
        for name in imported(source)
        if name.startswith((".", "recipes.", "timm_resnas.recipes.")) or name.partition(".")[0] in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_recipes_do_not_import_each_other(name):
    assert not other_recipes((RECIPES / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        *("from search import main", "import train as t", "from . import train", "from .train import main"),
        *("from recipes import train", "import recipes.train", "from timm_resnas.recipes import train"),
        "def main():\n    from timm_resnas.recipes.train import main",
    ],
)
def test_every_way_of_importing_a_recipe_is_seen(line):
    assert other_recipes(line)
    assert not other_recipes(
        "import timm, timm_resnas.engine.run\nfrom timm_resnas.engine.settings import TrainOptions"
    )
