"""The recipe: what a user writes to describe a run. One YAML file, one pydantic model.

Paths are relative to the recipe.
"""

from treeq_export.recipe.fields import Section
from treeq_export.recipe.load import change_section, load_recipe, make_recipe, override_recipe
from treeq_export.recipe.search_section import (
    BranchBudget,
    BudgetSection,
    SearchSection,
    strategy_options,
)
from treeq_export.recipe.sections import (
    BenchSection,
    CalibrateSection,
    CompileSection,
    EvaluateSection,
    FinetuneSection,
    ModelSection,
    ParityGates,
    PipelineScheduler,
    QualityGates,
    Recipe,
    SamplerSection,
    ValidateSection,
)

__all__ = [
    "BenchSection",
    "BranchBudget",
    "BudgetSection",
    "CalibrateSection",
    "CompileSection",
    "EvaluateSection",
    "FinetuneSection",
    "ModelSection",
    "ParityGates",
    "PipelineScheduler",
    "QualityGates",
    "Recipe",
    "SamplerSection",
    "SearchSection",
    "Section",
    "ValidateSection",
    "change_section",
    "load_recipe",
    "make_recipe",
    "override_recipe",
    "strategy_options",
]
