"""The cells of a comparison: each is a run folder with a recipe of its own.

What a cell's recipe has of its own is strategy, budget and finetune mode; the rest is shared, so
that a difference between two cells has one cause.
"""

from dataclasses import dataclass
from typing import Any

from treeq_export.compare.options import MIN_SEEDS, CompareOptions
from treeq_export.errors import RecipeError
from treeq_export.recipe import Recipe

PTQ = "ptq"  # how a row calls finetune mode "none"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        name: Its folder below DIR/cells.
        strategy: How the bits are assigned.
        variant: "ptq", "peft" or "qat".
        budget: Average bits of weights and of activations.
        recipe: Its recipe.
        base: Name of the cell with the same search and calibration; None for that cell itself.
    """

    name: str
    strategy: str
    variant: str
    budget: float
    recipe: Recipe
    base: str | None


def make_cells(recipe: Recipe, options: CompareOptions) -> list[Cell]:
    """Return the cells of all strategies, budgets and variants, the trained ones after theirs.

    Args:
        recipe: What the cells share (`shared_recipe`).
        options: What they do not share.
    """
    cells: list[Cell] = []
    for budget in options.budgets:
        for strategy in options.strategies:
            base = f"{strategy}-{budget:g}"
            for mode in dict.fromkeys(("none", *options.variants)):
                trained = mode != "none"
                cells.append(
                    Cell(
                        name=f"{base}-{mode}" if trained else base,
                        strategy=strategy,
                        variant=mode if trained else PTQ,
                        budget=budget,
                        recipe=_cell_recipe(recipe, strategy, budget, mode),
                        base=base if trained else None,
                    )
                )
    return cells


def shared_recipe(recipe: Recipe, options: CompareOptions) -> Recipe:
    """Return the recipe with what all cells share: images from PyTorch, the seeds, no gates.

    Raises:
        RecipeError: The recipe has too few seeds for a spread, and the options name none.
    """
    seeds = options.seeds or tuple(recipe.evaluate.seeds)
    if options.seeds is None and len(set(seeds)) < MIN_SEEDS:
        listed = ", ".join(map(str, seeds))
        raise RecipeError(
            f"evaluate.seeds: received {listed}, expected at least {MIN_SEEDS} for mean and "
            "spread. Give --seeds 0,1,2 (fewer there if you want no spread)."
        )
    values = recipe.model_dump(mode="json", by_alias=True)
    values["evaluate"] |= {
        "runner": "torch",
        "baseline": None,
        "gates": {},
        "seeds": list(dict.fromkeys(seeds)),
    }
    return Recipe.model_validate(values)


def _cell_recipe(recipe: Recipe, strategy: str, budget: float, mode: str) -> Recipe:
    values = recipe.model_dump(mode="json", by_alias=True)
    values["search"]["strategy"] = strategy
    values["search"]["budget"] = {"weight_bits": budget, "activation_bits": budget}
    values["finetune"]["mode"] = mode
    return Recipe.model_validate(values)


def comparable_part(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what all rows of one table have to share: all but each cell's own.

    Args:
        recipe: From `recipe_with_digests`.
    """
    own = {"search": {"strategy", "budget"}, "finetune": {"mode"}}
    return {
        name: {key: value[key] for key in value if key not in own[name]} if name in own else value
        for name, value in recipe.items()
    }
