"""One search's files and workers: prepared once, opened in any process.

A session is small and can be pickled: a Ray worker loads the checkpoint and opens the prepared
files itself. All processes use the same number of threads, so that they measure the same values.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from treeq_export import __version__
from treeq_export.errors import PlanError
from treeq_export.model.checkpoint import load_model, open_checkpoint
from treeq_export.model.layers import LinearInfo, discover_linears
from treeq_export.model.replay import BlockReplay, Output, block_names
from treeq_export.model.sensitivity import probe_gradients
from treeq_export.model.statistics import InputStatistics
from treeq_export.model.trajectories import collect_rows, predict
from treeq_export.model.zoo import Denoiser, make_denoiser
from treeq_export.plan import LayerPlan
from treeq_export.quant.spec import BranchFormat
from treeq_export.reading import parse_record
from treeq_export.recipe import Recipe
from treeq_export.sealed import Say, say_nothing
from treeq_export.search.formats import make_layer_plan
from treeq_export.search.measure.bank import LayerBank
from treeq_export.search.measure.segment import (
    LinearSwitch,
    SegmentWorker,
    biases_of,
    quantized_handlers,
)
from treeq_export.search.prepare import (
    FINAL_FILE,
    ROWS_FILE,
    Store,
    block_file,
    fit_weights,
    probe_file,
    record_outputs,
    save_blocks,
    save_probes,
    save_rows,
    weight_file,
)
from treeq_export.search.tree import build_tree, decode, make_leaves

_FINAL_SEED_OFFSET = 500  # calibration has 0, the held-out inputs of `evaluate` have 1000
_TOKENS_PER_BATCH = 2048  # a forward pass stays in the processor's cache
_MEASURE = 3  # raised when the same key stands for another value (segments.py)
_IGNORED = ("strategy", "budget", "noise", "keep", "refine", "executor", "num_workers")


@dataclass(frozen=True)
class Session:
    """What a worker needs to know.

    Attributes:
        folder: `search/` of the run folder.
        recipe: The recipe, as JSON.
        branches: Branch shape by layer.
        names: The searched layers.
        environment: The configuration of the noisy environment, as text.
        batch_rows: Rows of one forward pass.
    """

    folder: Path
    recipe: str
    branches: Mapping[str, BranchFormat]
    names: frozenset[str]
    environment: str
    batch_rows: int

    def open(self, denoiser: Denoiser | None = None) -> SegmentWorker:
        """Return a worker of this process.

        Args:
            denoiser: The full-precision model; None loads the recipe's checkpoint.
        """
        recipe = _read_recipe(self.recipe)
        torch.set_num_threads(recipe.search.threads)
        if denoiser is None:
            checkpoint = open_checkpoint(Path(recipe.model.checkpoint), recipe.model.variant)
            denoiser = make_denoiser(load_model(checkpoint), checkpoint, recipe.model)
        found = discover_linears(denoiser)
        linears = [linear for linear in found if linear.name in self.names]
        leaves = make_leaves(linears)
        store = Store(self.folder, "")
        return SegmentWorker(
            denoiser,
            block_names(found),
            leaves,
            build_tree(leaves),
            store,
            make_bank(store, denoiser, linears, recipe, self.branches),
            environment=decode(self.environment),
            noise=recipe.search.noise,
            with_probes=recipe.search.num_probes > 0,
            batch_rows=self.batch_rows,
        )


def make_templates(
    linears: Sequence[LinearInfo], recipe: Recipe, branches: Mapping[str, BranchFormat]
) -> list[LayerPlan]:
    """Return one entry per layer whose bits are placeholders: the least candidates."""
    section = recipe.search
    bits = min(section.weight_candidates), min(section.activation_candidates)
    return [make_layer_plan(x, section, *bits, branches.get(x.name)) for x in linears]


def make_bank(
    store: Store,
    denoiser: Denoiser,
    linears: Sequence[LinearInfo],
    recipe: Recipe,
    branches: Mapping[str, BranchFormat],
) -> LayerBank:
    """Return the bank of quantized layers over prepared files."""
    templates = {layer.name: layer for layer in make_templates(linears, recipe, branches)}
    biases = biases_of(denoiser, list(templates))
    return LayerBank(store, templates, biases, recipe.search.activation_scale)


def weights_fingerprint(
    recipe: Recipe, checkpoint_sha256: str, branches: Mapping[str, BranchFormat]
) -> str:
    """Return the digest of everything that rows, clean outputs and weights depend on."""
    search = recipe.search.model_dump(mode="json", exclude=set(_IGNORED))
    depends = {
        "version": __version__,
        "checkpoint": checkpoint_sha256,
        "model": recipe.model.model_dump(mode="json", exclude={"checkpoint"}),
        "sampler": recipe.sampler.model_dump(mode="json"),
        "calibrate": recipe.calibrate.model_dump(mode="json"),
        "seed": recipe.seed,
        "search": search,
        "branches": {name: branches[name].model_dump() for name in sorted(branches)},
    }
    return _digest(depends)


def journal_fingerprint(weights: str, environment: str, noise: float) -> str:
    """Return the digest of everything that a measured value depends on beside its key."""
    depends = {"weights": weights, "noise": noise, "environment": environment if noise else ""}
    return _digest(depends | {"measure": _MEASURE})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def prepare(
    session: Session,
    denoiser: Denoiser,
    fingerprint: str,
    statistics: Callable[[], Mapping[str, InputStatistics]],
    on_step: Callable[[float], None],
    say: Say = say_nothing,
) -> None:
    """Write what the workers read; whole files of the same fingerprint are kept.

    Args:
        session: The search.
        denoiser: The full-precision model.
        fingerprint: Of `weights_fingerprint`.
        statistics: Returns every layer's rotated input; called only if weights are missing.
        on_step: Called with the fraction done, 0..1.
        say: Told in one line that a file is damaged.
    """
    recipe = _read_recipe(session.recipe)
    found = discover_linears(denoiser)
    linears = [linear for linear in found if linear.name in session.names]
    leaves = make_leaves(linears)
    store = Store(session.folder, fingerprint, say)
    templates = make_templates(linears, recipe, session.branches)
    whole = {layer.name for layer in templates if store.has(weight_file(layer.name))}
    if len(whole) < len(templates):
        fit_weights(
            store,
            denoiser,
            [layer for layer in templates if layer.name not in whole],
            statistics(),
            recipe,
            lambda part: on_step(0.8 * part),
        )
    noisy = Store(session.folder, journal_fingerprint(fingerprint, session.environment, 1.0), say)
    names = block_names(found)
    searched = sorted({leaf.block for leaf in leaves})
    probed = searched if recipe.search.num_probes else []
    wanted = [ROWS_FILE, *([FINAL_FILE] if recipe.search.num_final_rows else [])]
    wanted += [probe_file(block) for block in probed]
    if all(store.has(name) for name in wanted) and all(
        noisy.has(block_file(block)) for block in range(len(names))
    ):
        return
    rows = collect_rows(
        denoiser,
        recipe.sampler,
        num_samples=recipe.search.num_samples,
        num_rows=recipe.search.num_rows,
        seed=recipe.seed,
        on_step=lambda part: on_step(0.8 + 0.1 * part),
    )
    bank = make_bank(store, denoiser, linears, recipe, session.branches)
    with BlockReplay(denoiser, names) as replay:
        clean, prediction = record_outputs(replay, rows, session.batch_rows, session.folder)
        with LinearSwitch(denoiser, [linear.name for linear in linears]) as switch:
            environment = decode(session.environment)
            switch.handlers = quantized_handlers(bank, leaves, environment)
            dirty, _ = record_outputs(replay, rows, session.batch_rows, session.folder)
    if recipe.search.num_final_rows:
        others = collect_rows(
            denoiser,
            recipe.sampler,
            num_samples=recipe.search.num_samples,
            num_rows=recipe.search.num_final_rows,
            seed=recipe.seed + _FINAL_SEED_OFFSET,
        )
        save_rows(store, FINAL_FILE, others, predict(denoiser, others, session.batch_rows))
    if recipe.search.num_probes:
        gradients = probe_gradients(
            denoiser,
            [names[block] for block in searched],
            rows,
            num_probes=recipe.search.num_probes,
            batch_rows=session.batch_rows,
            seed=recipe.seed,
            folder=session.folder,
        )
        save_probes(store, dict(zip(searched, gradients, strict=True)))
    save_blocks(noisy, clean, dirty)
    save_rows(store, ROWS_FILE, rows, prediction)
    on_step(1.0)


def choose_batch_rows(denoiser: Denoiser, blocks: Sequence[str]) -> int:
    """Return how many rows of the network make about `_TOKENS_PER_BATCH` tokens."""
    sizes: list[int] = []

    def see(_block: int, output: Output) -> None:
        sizes.append(sum(x.shape[1] for x in output if x is not None and x.ndim == 3))

    with BlockReplay(denoiser, blocks) as replay:
        replay.run(denoiser.make_example_inputs(1, seed=0), last=0, on_output=see)
    return max(1, _TOKENS_PER_BATCH // max(sizes[0], 1))


def _read_recipe(text: str) -> Recipe:
    return parse_record(
        text, Recipe, "the search's recipe", error=PlanError, remedy="Search again."
    )
