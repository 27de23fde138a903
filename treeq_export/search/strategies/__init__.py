"""Strategies: how formats are chosen within a budget. Their list is the one in this file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from treeq_export.recipe import SearchSection
from treeq_export.search.strategies.context import Outcome, SearchContext
from treeq_export.search.strategies.greedy import search_greedy
from treeq_export.search.strategies.integer import search_integer_program
from treeq_export.search.strategies.tss import search_tree_and_refine
from treeq_export.search.strategies.uniform import search_uniform


@dataclass(frozen=True)
class Strategy:
    """One way to choose formats.

    Attributes:
        run: Returns the choice; deterministic.
        measures: Whether configurations are measured, within a budget and on the model's inputs.
        estimates: Whether the number of measurements is known, and said, before it starts.
    """

    run: Callable[[SearchContext], Outcome]
    measures: bool
    estimates: bool


STRATEGIES: Mapping[str, Strategy] = {
    "uniform": Strategy(search_uniform, measures=False, estimates=False),
    "tss": Strategy(search_tree_and_refine, measures=True, estimates=True),
    "integer_programming": Strategy(search_integer_program, measures=True, estimates=False),
    "greedy": Strategy(search_greedy, measures=True, estimates=False),
}


def needs_inputs(section: SearchSection) -> bool:
    """Whether a search runs the model on sampled trajectories."""
    return STRATEGIES[section.strategy].measures or section.branch_budget is not None
