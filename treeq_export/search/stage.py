"""The search stage: discover the layers, ask a strategy for their formats, write the plan.

`plan.json` is the assignment, `search.json` how it was found. Everything measured on the way is in
`search/journal.sqlite`: a search that is killed goes on where it was.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter

import torch

from treeq_export.errors import CheckpointError
from treeq_export.model.checkpoint import Checkpoint
from treeq_export.model.layers import discover
from treeq_export.model.statistics import InputStatistics, collect_statistics
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import FORMAT_VERSION, ModelRecord, Plan, StrategyRecord, save_plan
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.recipe import Recipe, strategy_options
from treeq_export.records import (
    SearchCost,
    SearchFinalist,
    SearchNode,
    SearchRecord,
    save_record,
)
from treeq_export.run_folder import RunFolder
from treeq_export.search.branches import choose_branches
from treeq_export.search.budget import CostModel, make_budget
from treeq_export.search.estimate import estimate_cost
from treeq_export.search.executor import (
    Executor,
    Key,
    LocalExecutor,
    Tally,
    Task,
    measure_all,
)
from treeq_export.search.formats import assign, make_templates
from treeq_export.search.journal import Journal
from treeq_export.search.measure.calibrated import CalibratedNetwork
from treeq_export.search.measure.worker import MeasuringWorker
from treeq_export.search.network import Network, make_network
from treeq_export.search.prepare import choose_batch_rows, prepare
from treeq_export.search.ray_executor import RayExecutor
from treeq_export.search.session import Session
from treeq_export.search.strategies import STRATEGIES, Strategy
from treeq_export.search.strategies.context import Measure, Outcome, SearchContext
from treeq_export.search.strategies.uniform import uniform_configuration
from treeq_export.search.tree import Configuration, describe, walk

JOURNAL_FILE = "journal.sqlite"
_BRANCHES, _PREPARED = 0.05, 0.1  # fractions of the progress bar at which these are done


def run_search(
    run: Path,
    denoiser: Denoiser,
    checkpoint: Checkpoint,
    recipe: Recipe,
    on_step: OnStep,
    say: Say = say_nothing,
) -> Plan:
    """Call `find_plan`, write `plan.json`, still without tensors, and `search.json`."""
    plan, record = find_plan(run, denoiser, checkpoint, recipe, on_step, say)
    save_record(run / RunFolder.SEARCH, record)
    return save_plan(run, plan)


def find_plan(
    run: Path,
    denoiser: Denoiser,
    checkpoint: Checkpoint,
    recipe: Recipe,
    on_step: OnStep,
    say: Say = say_nothing,
) -> tuple[Plan, SearchRecord]:
    """Choose every layer's formats.

    Args:
        run: The run folder; a search that measures keeps what it measured there.
        denoiser: The full-precision model.
        checkpoint: The checkpoint that the model came from.
        recipe: The recipe.
        on_step: Called with the fraction done, 0..1.
        say: Called with the cost, before the search starts.

    Returns:
        The plan, without tensors, and how it was found.

    Raises:
        FormatError: A format does not fit a layer.
        CheckpointError: The network has no layer that can be quantized.
        RecipeError: `search.exclude` matches nothing or everything, or the budget cannot be met.
        RunnerError: The executor is not installed.
    """
    with _threads(recipe.search.threads):
        found = _Search(run, denoiser, checkpoint, recipe, on_step, say).execute()
    on_step(1.0)
    return found


def estimate_search(
    run: Path, denoiser: Denoiser, checkpoint: Checkpoint, recipe: Recipe, say: Say
) -> SearchCost:
    """Say what a tree search would cost; nothing is searched or written.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        checkpoint: The checkpoint that the model came from.
        recipe: The recipe.
        say: Called with the cost in words.

    Raises:
        TreeqError: The same as by `run_search`.
    """
    with _threads(recipe.search.threads):
        search = _Search(run, denoiser, checkpoint, recipe, lambda _: None, say)
        return search.announce(search.network)


@contextmanager
def _threads(number: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self._folder = run / RunFolder.SEARCH_FILES
        self._denoiser = denoiser
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._section = recipe.search
        self._on_step = on_step
        self._say = say
        self._started = perf_counter()
        discovery = discover(denoiser)
        if discovery.note is not None:
            say(discovery.note)
        if not discovery.linears:
            raise CheckpointError(
                f"{checkpoint.path}: no quantizable layer, that is no linear in a transformer "
                "block. Check num_layers in its config.json, or use another checkpoint."
            )
        self._unused = discovery.unused
        self.network = make_network(discovery.linears, recipe.search.exclude)

    def execute(self) -> tuple[Plan, SearchRecord]:
        """Return the plan, without tensors, and how it was found."""
        section, strategy = self._section, STRATEGIES[self._section.strategy]
        branches, trials = choose_branches(
            self._denoiser,
            self.network,
            self._recipe,
            lambda: self._statistics,
            lambda part: self._on_step(_BRANCHES * part),
        )
        network = replace(self.network, branches=branches)
        context = SearchContext(section, network, CostModel(network, section))
        cost, tally = None, Tally()
        if strategy.measures:
            context = replace(context, budget=make_budget(section, context.costs))
            cost = self.announce(network) if strategy.estimates else None
            alone = len(network.leaves) * len(context.candidates) * len(network.blocks)
            expected = cost.num_block_runs if cost else alone
            tally = Tally(expected, self._on_step, _PREPARED)
            outcome = self._measure(strategy, context, tally)
        else:
            outcome = strategy.run(context)
        limits = section.budget.model_dump(exclude_none=True) if section.budget else {}
        plan = self._make_plan(network, outcome.configuration)
        return plan, SearchRecord(
            strategy=section.strategy,
            noise=section.noise,
            budget={name: float(value) for name, value in limits.items()},
            cost=cost,
            num_measured=tally.num_measured,
            num_from_journal=tally.num_reused,
            seconds=round(perf_counter() - self._started, 3),
            network_mse=outcome.network_mse if strategy.measures else None,
            nodes=_describe_tree(context, outcome),
            front=outcome.front,
            finalists=_describe_finalists(context, outcome),
            branches={
                name: [trial.describe() for trial in tried] for name, tried in trials.items()
            },
            unused_layers=self._unused,
        )

    def announce(self, network: Network) -> SearchCost:
        """Time one block and say what the search will cost."""
        cost, line = estimate_cost(self._denoiser, network, self._section, self._batch_rows)
        self._say(line)
        return cost

    @cached_property
    def _statistics(self) -> Mapping[str, InputStatistics]:
        templates = make_templates(self.network, self._section)
        return collect_statistics(self._denoiser, templates, self._recipe, lambda _: None)

    @cached_property
    def _batch_rows(self) -> int:
        return choose_batch_rows(self._denoiser, self.network.blocks)

    def _measure(self, strategy: Strategy, context: SearchContext, tally: Tally) -> Outcome:
        """Prepare a session and run a strategy that measures configurations in it."""
        section, network = self._section, context.network
        widths = (section.weight_candidates, section.activation_candidates)
        session = Session(
            folder=self._folder,
            recipe=self._recipe,
            checkpoint_sha256=self._checkpoint.sha256,
            network=network,
            environment=uniform_configuration(context.costs, section, widths),
            batch_rows=self._batch_rows,
        )
        prepare(
            session,
            self._denoiser,
            lambda: self._statistics,
            lambda part: self._on_step(_BRANCHES + (_PREPARED - _BRANCHES) * part),
            self._say,
        )
        known = session.journal_fingerprint(section.noise)
        with Journal(self._folder / JOURNAL_FILE, known, say=self._say) as journal:

            def measure_on(executor: Executor) -> Measure:
                def measure(tasks: Sequence[Task], block_runs: int) -> dict[Key, float]:
                    return measure_all(tasks, journal, executor, tally.count(tasks, block_runs))

                return measure

            with ExitStack() as stack:
                executor = stack.enter_context(self._make_executor(session, stack))
                outcome = strategy.run(replace(context, measure=measure_on(executor)))
            if section.calibrated_finalists and len(outcome.finalists) > 1:
                make_plan = partial(self._make_plan, network)
                make_worker = partial(CalibratedNetwork, session, self._denoiser, make_plan)
                with LocalExecutor(make_worker) as executor:
                    calibrating = replace(context, measure=measure_on(executor))
                    outcome = calibrating.choose_calibrated(outcome)
        return outcome

    def _make_executor(self, session: Session, stack: ExitStack) -> Executor:
        section = self._section
        if section.executor == "ray":
            make_worker = partial(MeasuringWorker, session)
            return RayExecutor(make_worker, section.num_workers, section.threads)

        def open_here() -> MeasuringWorker:
            worker = MeasuringWorker(session, self._denoiser)
            stack.callback(worker.close)
            return worker

        return LocalExecutor(open_here)

    def _make_plan(self, network: Network, configuration: Configuration) -> Plan:
        """Return the plan of a configuration, without tensors."""
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
            layers=assign(network, configuration, self._section),
        )


def _describe_tree(context: SearchContext, outcome: Outcome) -> list[SearchNode]:
    """Return the tree with what the chosen configuration spends in each node."""
    nodes: list[SearchNode] = []
    for node, depth in walk(context.network.root) if outcome.kept else ():
        inside = outcome.configuration[node.first : node.last + 1]
        cost = context.costs.cost(inside, node.first)
        nodes.append(
            SearchNode(
                name=describe(node, context.leaves),
                depth=depth,
                first_leaf=node.first,
                last_leaf=node.last,
                num_configurations=outcome.kept[node.name],
                **cost.averages,
            )
        )
    return nodes


def _describe_finalists(context: SearchContext, outcome: Outcome) -> list[SearchFinalist]:
    """Return the finalists with what they cost."""
    costs = [context.costs.cost(finalist.configuration) for finalist in outcome.finalists]
    return [
        SearchFinalist(
            **cost.averages,
            network_mse=finalist.network_mse,
            final_mse=finalist.final_mse,
            calibrated_mse=finalist.calibrated_mse,
            chosen=finalist.configuration == outcome.configuration,
        )
        for cost, finalist in zip(costs, outcome.finalists, strict=True)
    ]
