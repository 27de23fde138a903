"""The cells of a comparison: each is a run folder with a recipe of its own.

What a cell's recipe has of its own is strategy, budget and finetune mode; the rest is shared, so
that a difference between two cells has one cause.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeq_export.artefacts import atomic_path
from treeq_export.compare.options import MIN_SEEDS, CompareOptions
from treeq_export.compare.rows import count_evaluations, read_quality, score_fields
from treeq_export.errors import RecipeError
from treeq_export.pipeline.run import fingerprint, is_up_to_date, run_stages, stage_named
from treeq_export.pipeline.workspace import Workspace, read_run
from treeq_export.progress import OnStep, no_progress
from treeq_export.recipe import Recipe
from treeq_export.records import CompareRow, SearchRecord, load_record
from treeq_export.run_folder import RunFolder

PTQ = "ptq"  # how a row calls finetune mode "none"
SHARED_STAGES = ("search", "calibrate")
CELL_STAGES = (*SHARED_STAGES, "finetune", "evaluate")

# Opens the bar of a stage and returns its callback.
StartStage = Callable[[str], OnStep]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison, whose plan comes from one of our strategies.

    Attributes:
        name: Name of its folder below DIR/cells.
        strategy: Search strategy.
        variant: "ptq", "peft" or "qat".
        budget: Average bits of weights and of activations.
        recipe: The recipe of the run.
        base: Name of the cell with the same search and calibration; None for that cell itself.
    """

    name: str
    strategy: str
    variant: str
    budget: float
    recipe: Recipe
    base: str | None

    def is_finished(self, run: Workspace) -> bool:
        """Whether nothing is left to do."""
        return all(is_up_to_date(run, stage_named(name)) for name in CELL_STAGES)

    def work(self, run: Workspace, start_stage: StartStage) -> bool:
        """Run the stages that are not up to date; return whether there were any."""
        run.save()
        if self.base is not None:
            _take_over(run.run.with_name(self.base), run)

        def on_stage(name: str, skipped: bool) -> OnStep:
            return no_progress if skipped else start_stage(name)

        return bool(run_stages(run, [stage_named(name) for name in CELL_STAGES], on_stage))

    def make_row(self, run: Workspace) -> CompareRow:
        """Return the row of the finished cell.

        Raises:
            PlanError: A record is malformed.
        """
        search = None
        if (run.run / RunFolder.SEARCH).is_file():
            search = load_record(run.run / RunFolder.SEARCH, SearchRecord, "search")
        plan = run.plan
        return CompareRow(
            name=self.name,
            strategy=self.strategy,
            variant=self.variant,
            peer=False,
            description="",
            budget=self.budget,
            weight_bits=plan.average_weight_bits,
            activation_bits=plan.average_activation_bits,
            branch_parameter_fraction=plan.branch_parameter_fraction,
            seconds={
                name: record.seconds
                for name, record in run.stages.items()
                if name != "finetune" or self.base is not None
            },
            num_evaluations=count_evaluations(search),
            front=search.front if search is not None and self.base is None else [],
            **score_fields(read_quality(run)),
        )


def _take_over(base: Path, run: Workspace) -> None:
    """Copy what another cell has searched and calibrated with the same recipe sections."""
    done = read_run(base).stages
    for name in SHARED_STAGES:
        stage, record = stage_named(name), done.get(name)
        if record is None or record.fingerprint != fingerprint(run, stage):
            return
        if not is_up_to_date(run, stage):
            for file in record.outputs:
                with atomic_path(run.run / file) as temporary:
                    shutil.copyfile(base / file, temporary)
            run.stages[name] = record
    run.save()


def make_cells(recipe: Recipe, options: CompareOptions) -> list[Cell]:
    """Return the cells of all strategies, budgets and variants, the trained ones after theirs.

    Args:
        recipe: The recipe that the cells share (`shared_recipe`).
        options: Everything that differs between cells.
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
