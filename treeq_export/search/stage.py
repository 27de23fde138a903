"""The search stage: discover the layers, ask a strategy for their formats, write the plan.

`plan.json` is the assignment, `search.json` how it was found. Everything measured on the way is in
`search/journal.sqlite`: a search that is killed goes on where it was.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from time import perf_counter

import torch

from treeq_export.errors import CheckpointError, RecipeError
from treeq_export.model.checkpoint import Checkpoint
from treeq_export.model.layers import LinearInfo, discover
from treeq_export.model.replay import block_names
from treeq_export.model.statistics import InputStatistics, collect_statistics
from treeq_export.model.zoo import Denoiser
from treeq_export.ops import MAX_BITS
from treeq_export.plan import (
    FORMAT_VERSION,
    LayerPlan,
    ModelRecord,
    Plan,
    StrategyRecord,
    save_plan,
)
from treeq_export.quant.spec import BranchFormat
from treeq_export.recipe import Recipe, SearchSection, strategy_options
from treeq_export.records import SearchCost, SearchRecord, save_record
from treeq_export.search.branches import BranchTrial, choose_branches
from treeq_export.search.budget import CostModel, make_budget
from treeq_export.search.describe import describe_finalists, describe_tree, describe_trial
from treeq_export.search.estimate import describe_cost, estimate_cost, time_block
from treeq_export.search.executor import Executor, Key, LocalExecutor, Tally, Task, measure_all
from treeq_export.search.formats import assign, candidate_pairs, make_layer_plan
from treeq_export.search.journal import Journal
from treeq_export.search.measure.calibrated import (
    CalibratingWorker,
    calibration_task,
    choose_calibrated,
)
from treeq_export.search.measure.segment import SegmentWorker
from treeq_export.search.prepare import FINAL_FILE, FOLDER, ROWS_FILE, Store
from treeq_export.search.progress import SearchProgress
from treeq_export.search.ray_executor import RayExecutor
from treeq_export.search.session import (
    Session,
    choose_batch_rows,
    journal_fingerprint,
    make_templates,
    prepare,
    weights_fingerprint,
)
from treeq_export.search.strategies.context import Outcome, SearchContext
from treeq_export.search.strategies.greedy import (
    search_greedy,
    search_integer_program,
    uniform_configuration,
)
from treeq_export.search.strategies.refine import refine
from treeq_export.search.strategies.tss import search_tree
from treeq_export.search.strategies.uniform import assign_uniform
from treeq_export.search.tree import Configuration, build_tree, encode, make_leaves

RECORD_FILE = "search.json"
JOURNAL_FILE = "journal.sqlite"
_BRANCHES, _PREPARED = 0.05, 0.1  # fractions of the progress bar at which these are done

OnStep = Callable[[float], None]
Say = Callable[[str], None]


def _tree_and_refine(context: SearchContext) -> Outcome:
    outcome = search_tree(context)
    least_gain = context.section.refine
    return outcome if least_gain is None else refine(context, outcome, least_gain)


STRATEGIES: dict[str, Callable[[SearchContext], Outcome]] = {
    "tss": _tree_and_refine,
    "integer_programming": search_integer_program,
    "greedy": search_greedy,
}


def select_linears(linears: list[LinearInfo], exclude: list[str]) -> list[LinearInfo]:
    """Return the layers that no glob pattern excludes.

    Raises:
        RecipeError: A pattern matches nothing, or nothing is left.
    """
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(linear.name, pattern) for linear in linears):
            raise RecipeError(
                f"search.exclude: {pattern!r} matches none of {len(linears)} layers, "
                f"such as {linears[0].name}. Correct or remove the pattern."
            )
    selected = [
        linear
        for linear in linears
        if not any(fnmatch.fnmatchcase(linear.name, pattern) for pattern in exclude)
    ]
    if not selected:
        raise RecipeError("search.exclude: leaves no layer to quantize. Remove a pattern.")
    return selected


def run_search(
    run: Path,
    denoiser: Denoiser,
    checkpoint: Checkpoint,
    recipe: Recipe,
    on_step: OnStep,
    say: Say = lambda _: None,
) -> Plan:
    """Choose every layer's formats; write `plan.json`, still without tensors, and `search.json`.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        checkpoint: Where it came from.
        recipe: The recipe.
        on_step: Called with the fraction done, 0..1.
        say: Called with the cost, before the search starts.

    Returns:
        The plan as written.

    Raises:
        FormatError: A format does not fit a layer.
        CheckpointError: The network has no layer that can be quantized.
        RecipeError: `search.exclude` matches nothing or everything, or the budget cannot be met.
        RunnerError: The executor is not installed.
    """
    search = _Search(run, denoiser, checkpoint, recipe, on_step, say)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.search.threads)
    try:
        layers, record = search.execute()
    finally:
        torch.set_num_threads(threads)
    plan = search.make_plan(layers)
    on_step(1.0)
    save_record(run / RECORD_FILE, record)
    return save_plan(run, plan)


def estimate_search(
    run: Path, denoiser: Denoiser, checkpoint: Checkpoint, recipe: Recipe, say: Say
) -> SearchCost:
    """Say what a tree search would cost; nothing is searched or written.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        checkpoint: Where it came from.
        recipe: The recipe.
        say: Called with the cost in words.

    Raises:
        As `run_search`.
    """
    search = _Search(run, denoiser, checkpoint, recipe, lambda _: None, say)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.search.threads)
    try:
        return search.announce({})
    finally:
        torch.set_num_threads(threads)


class _Search:
    """One run of the stage: its inputs, and what several steps need."""

    def __init__(
        self,
        run: Path,
        denoiser: Denoiser,
        checkpoint: Checkpoint,
        recipe: Recipe,
        on_step: OnStep,
        say: Say,
    ) -> None:
        self._folder = run / FOLDER
        self._denoiser = denoiser
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._section = recipe.search
        self._on_step = on_step
        self._say = say
        self._started = perf_counter()
        discovery = discover(denoiser)
        found, self._unused = discovery.linears, discovery.unused
        if discovery.note is not None:
            say(discovery.note)
        if not found:
            raise CheckpointError(
                f"{checkpoint.path}: no quantizable layer, that is no linear in a transformer "
                "block. Check num_layers in its config.json, or use another checkpoint."
            )
        self._blocks = block_names(found)
        self._linears = select_linears(found, recipe.search.exclude)
        self._leaves = make_leaves(self._linears)

    def make_plan(self, layers: tuple[LayerPlan, ...]) -> Plan:
        """Return the plan with these layers, without tensors."""
        recipe, checkpoint = self._recipe, self._checkpoint
        return Plan(
            format_version=FORMAT_VERSION,
            model=ModelRecord(
                name=recipe.name,
                class_name=checkpoint.class_name,
                num_parameters=sum(p.numel() for p in self._denoiser.model.parameters()),
            ),
            checkpoint_sha256=checkpoint.sha256,
            strategy=StrategyRecord(
                name=self._section.strategy, options=strategy_options(self._section)
            ),
            layers=layers,
        )

    def execute(self) -> tuple[tuple[LayerPlan, ...], SearchRecord]:
        """Return the plan's layers and the record."""
        trials = self._choose_branches()
        branches = self._branches_of(trials)
        if self._section.strategy == "uniform":
            layers = assign_uniform(self._linears, self._section, branches)
            return layers, self._record(trials)
        return self._measure(branches, trials)

    @cached_property
    def _statistics(self) -> Mapping[str, InputStatistics]:
        templates = make_templates(self._linears, self._recipe, {})
        return collect_statistics(self._denoiser, templates, self._recipe, lambda _: None)

    def _choose_branches(self) -> dict[str, list[BranchTrial]]:
        """Try branch shapes on every layer where the recipe gives a parameter budget for them."""
        section = self._section
        if section.branch_budget is None:
            return {}
        weight_bits, activation_bits = nominal_bits(section)
        layers = [
            make_layer_plan(linear, section, weight_bits, activation_bits, None)
            for linear in self._linears
        ]
        return choose_branches(
            self._denoiser,
            layers,
            self._statistics,
            self._recipe.calibrate,
            section.branch_budget,
            lambda part: self._on_step(_BRANCHES * part),
        )

    def _branches_of(self, trials: Mapping[str, list[BranchTrial]]) -> dict[str, BranchFormat]:
        section = self._section
        if section.branch_budget is not None:
            return {name: tried[0].branch for name, tried in trials.items()}
        if section.branch is None:
            return {}
        return {linear.name: section.branch for linear in self._linears}

    def _measure(
        self, branches: dict[str, BranchFormat], trials: Mapping[str, list[BranchTrial]]
    ) -> tuple[tuple[LayerPlan, ...], SearchRecord]:
        """Run a strategy that measures configurations."""
        section, leaves = self._section, self._leaves
        costs = CostModel(leaves, section, branches)
        budget = make_budget(section, costs)
        make_templates(self._linears, self._recipe, branches)  # a shape that does not fit ends here
        cost = self.announce(branches) if section.strategy == "tss" else None
        widths = (section.weight_candidates, section.activation_candidates)
        session = Session(
            folder=self._folder,
            recipe=self._recipe.model_dump_json(by_alias=True),
            branches=branches,
            names=frozenset(linear.name for linear in self._linears),
            environment=encode(uniform_configuration(leaves, costs, section, widths)),
            batch_rows=self._batch_rows,
        )
        fingerprint = weights_fingerprint(self._recipe, self._checkpoint.sha256, branches)
        prepare(
            session,
            self._denoiser,
            fingerprint,
            lambda: self._statistics,
            lambda part: self._on_step(_BRANCHES + (_PREPARED - _BRANCHES) * part),
            self._say,
        )
        known = journal_fingerprint(fingerprint, session.environment, section.noise)
        tally = Tally()
        with Journal(self._folder / JOURNAL_FILE, known, say=self._say) as journal:
            expected = cost.num_block_runs if cost else self._count_alone()
            progress = SearchProgress(expected, tally, self._on_step, _PREPARED)
            with ExitStack() as stack:
                executor = stack.enter_context(self._make_executor(session, stack))

                def measure(tasks: Sequence[Task], block_runs: int) -> dict[Key, float]:
                    return measure_all(tasks, journal, executor, progress.count(tasks, block_runs))

                context = SearchContext(
                    section, leaves, build_tree(leaves), len(self._blocks), costs, budget, measure
                )
                outcome = STRATEGIES[section.strategy](context)
            if section.calibrated_finalists and len(outcome.finalists) > 1:
                task = calibration_task(outcome.finalists)
                with LocalExecutor(lambda: self._make_calibrating_worker(branches)) as calibrating:
                    on_measured = progress.count([task], len(task.suffixes) * len(self._blocks))
                    values = measure_all([task], journal, calibrating, on_measured)
                outcome = choose_calibrated(context, outcome, values, task)
        layers = assign(leaves, outcome.configuration, section, branches)
        return self._in_order(layers), self._record(trials, cost, tally, context, outcome)

    def _count_alone(self) -> int:
        """Return the block runs of every candidate of every leaf alone, on the whole network."""
        return len(self._leaves) * len(candidate_pairs(self._section)) * len(self._blocks)

    @cached_property
    def _batch_rows(self) -> int:
        return choose_batch_rows(self._denoiser, self._blocks)

    def announce(self, branches: Mapping[str, BranchFormat]) -> SearchCost:
        """Time one block and say what the search will cost."""
        seconds = time_block(
            self._denoiser,
            self._blocks,
            make_templates(self._linears, self._recipe, branches),
            num_rows=self._section.num_rows,
            batch_rows=self._batch_rows,
        )
        cost = estimate_cost(self._leaves, self._section, len(self._blocks), seconds)
        self._say(describe_cost(cost, seconds, self._section.num_rows))
        return cost

    def _make_calibrating_worker(self, branches: dict[str, BranchFormat]) -> CalibratingWorker:
        def make_plan(configuration: Configuration) -> Plan:
            layers = assign(self._leaves, configuration, self._section, branches)
            return self.make_plan(self._in_order(layers))

        name = FINAL_FILE if self._section.num_final_rows else ROWS_FILE
        rows, prediction = Store(self._folder, "").load_rows(name)
        return CalibratingWorker(self._denoiser, self._recipe, make_plan, rows, prediction)

    def _make_executor(self, session: Session, stack: ExitStack) -> Executor:
        section = self._section
        if section.executor == "ray":
            return RayExecutor(session.open, section.num_workers, section.threads)

        def open_here() -> SegmentWorker:
            worker = session.open(self._denoiser)
            stack.callback(worker.close)
            return worker

        return LocalExecutor(open_here)

    def _in_order(self, layers: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
        place = {linear.name: at for at, linear in enumerate(self._linears)}
        return tuple(sorted(layers, key=lambda layer: place[layer.name]))

    def _record(
        self,
        trials: Mapping[str, list[BranchTrial]],
        cost: SearchCost | None = None,
        tally: Tally | None = None,
        context: SearchContext | None = None,
        outcome: Outcome | None = None,
    ) -> SearchRecord:
        limits = self._section.budget
        spent = limits.model_dump(exclude_none=True) if limits else {}
        return SearchRecord(
            strategy=self._section.strategy,
            noise=self._section.noise,
            budget={name: float(value) for name, value in spent.items()},
            cost=cost,
            num_measured=tally.num_measured if tally else 0,
            num_from_journal=tally.num_reused if tally else 0,
            seconds=round(perf_counter() - self._started, 3),
            network_mse=outcome.network_mse if outcome else None,
            nodes=describe_tree(context, outcome) if context and outcome else [],
            front=outcome.front if outcome else [],
            finalists=describe_finalists(context, outcome) if context and outcome else [],
            branches={name: [describe_trial(t) for t in tried] for name, tried in trials.items()},
            unused_layers=self._unused,
        )


def nominal_bits(section: SearchSection) -> tuple[int, int]:
    """Return the bits that branch shapes are tried at: the budget's, to the nearest."""
    limits = section.budget
    weight = limits.weight_bits if limits and limits.weight_bits else section.weight_bits
    activation = section.activation_bits or MAX_BITS
    if limits and limits.activation_bits:
        activation = limits.activation_bits
    return round(weight), round(activation)
