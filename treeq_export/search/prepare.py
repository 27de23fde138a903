"""Preparing a search: everything that its measurements read is computed and written once.

Environmental Noise Guidance (the scalar is TreeQ's, this formula is ours): a segment's input is
x + lambda (x_q - x), with x_q what it is when all that lies before is quantized at the budget. The
noisy outputs are those of the network quantized uniformly at the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from treeq_export.model.fit import LayerFitter, clean_tokens
from treeq_export.model.mapped import make_tensor
from treeq_export.model.quantized import linear_of
from treeq_export.model.replay import BlockReplay, Output
from treeq_export.model.sensitivity import probe_gradients
from treeq_export.model.sequential import arrays_of
from treeq_export.model.statistics import InputStatistics
from treeq_export.model.trajectories import Rows, collect_rows, predict
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import LayerPlan
from treeq_export.progress import OnStep, Say, say_nothing
from treeq_export.recipe import Recipe
from treeq_export.search.formats import make_activation_format
from treeq_export.search.measure.bank import LayerBank
from treeq_export.search.measure.blocks import LinearSwitch
from treeq_export.search.session import Session
from treeq_export.search.store import (
    BLOCK_FILE,
    BRANCH,
    CLEAN,
    FINAL_FILE,
    NOISY,
    PROBE_FILE,
    ROWS_FILE,
    WEIGHT_FILE,
    Store,
    pair_prefix,
    slice_rows,
)

_FINAL_SEED_OFFSET = 500  # calibration has 0, the held-out inputs of `evaluate` have 1000
_TOKENS_PER_BATCH = 2048  # a forward pass stays in the processor's cache
_TOKENS_PER_CHANNEL = 8  # of the calibration tokens, for every pair of widths


def prepare(
    session: Session,
    denoiser: Denoiser,
    statistics: Callable[[], Mapping[str, InputStatistics]],
    on_step: OnStep,
    say: Say = say_nothing,
) -> None:
    """Write what the workers read; whole files of the same fingerprint are kept.

    Args:
        session: The search.
        denoiser: The full-precision model.
        statistics: Returns every layer's rotated input; called only if weights are missing.
        on_step: Called with the fraction done, 0..1.
        say: Told in one line that a file is damaged.
    """
    recipe, section, network = session.recipe, session.recipe.search, session.network
    store = Store(session.folder, session.weights_fingerprint, say)
    missing = [
        layer for layer in session.templates if not store.has(WEIGHT_FILE.format(layer.name))
    ]
    if missing:
        fitted = statistics()
        for done, layer in enumerate(missing, start=1):
            tensors = _fit_layer(denoiser, layer, fitted[layer.name], recipe)
            store.save(WEIGHT_FILE.format(layer.name), tensors)
            on_step(0.8 * (done / len(missing)))
    noisy = Store(session.folder, session.journal_fingerprint(1.0), say)
    searched = sorted({leaf.block for leaf in network.leaves})
    probed = searched if section.num_probes else []
    wanted = [ROWS_FILE, *([FINAL_FILE] if section.num_final_rows else [])]
    wanted += [PROBE_FILE.format(block) for block in probed]
    if all(store.has(name) for name in wanted) and all(
        noisy.has(BLOCK_FILE.format(block)) for block in range(len(network.blocks))
    ):
        return

    def collect(num_rows: int, seed: int, on_step: OnStep) -> Rows:
        return collect_rows(
            denoiser,
            recipe.sampler,
            num_samples=section.num_samples,
            num_rows=num_rows,
            seed=seed,
            on_step=on_step,
        )

    rows = collect(section.num_rows, recipe.seed, lambda part: on_step(0.8 + 0.1 * part))
    bank = LayerBank(session, denoiser)
    with BlockReplay(denoiser, network.blocks) as replay:
        clean, prediction = record_outputs(replay, rows, session.batch_rows, session.folder)
        with LinearSwitch(denoiser, network) as switch:
            switch.handlers = bank.handlers(network.leaves, session.environment)
            dirty, _ = record_outputs(replay, rows, session.batch_rows, session.folder)
    if section.num_final_rows:
        others = collect(section.num_final_rows, recipe.seed + _FINAL_SEED_OFFSET, lambda _: None)
        store.save_rows(FINAL_FILE, others, predict(denoiser, others, session.batch_rows))
    if probed:
        gradients = probe_gradients(
            denoiser,
            [network.blocks[block] for block in probed],
            rows,
            num_probes=section.num_probes,
            batch_rows=session.batch_rows,
            seed=recipe.seed,
            folder=session.folder,
        )
        for block, output in zip(probed, gradients, strict=True):
            store.save_outputs(PROBE_FILE.format(block), {"": output})
    for block, (output, noisy_output) in enumerate(zip(clean, dirty, strict=True)):
        noisy.save_outputs(BLOCK_FILE.format(block), {CLEAN: output, NOISY: noisy_output})
    store.save_rows(ROWS_FILE, rows, prediction)
    on_step(1.0)


def choose_batch_rows(denoiser: Denoiser, blocks: Sequence[str]) -> int:
    """Return how many rows of the network make about `_TOKENS_PER_BATCH` tokens."""
    sizes: list[int] = []

    def see(_block: int, output: Output) -> None:
        sizes.append(sum(x.shape[1] for x in output if x is not None and x.ndim == 3))

    with BlockReplay(denoiser, blocks) as replay:
        replay.run(denoiser.make_example_inputs(1, seed=0), last=0, on_output=see)
    return max(1, _TOKENS_PER_BATCH // max(sizes[0], 1))


def record_outputs(
    replay: BlockReplay, rows: Rows, batch_rows: int, folder: Path | None = None
) -> tuple[list[Output], Tensor]:
    """Run the whole network and return every block's output and the prediction, over all rows.

    Args:
        replay: The network.
        rows: The network's inputs.
        batch_rows: Rows of one forward pass.
        folder: Folder of the files that hold the outputs; None holds them in memory.
    """
    blocks: list[Output] = [()] * len(replay.blocks)
    predictions: list[Tensor] = []
    total = len(next(iter(rows.values())))
    for start in range(0, total, batch_rows):

        def keep(block: int, output: Output, start: int = start) -> None:
            if start == 0:
                blocks[block] = tuple(
                    None if x is None else make_tensor((total, *x.shape[1:]), x.dtype, folder)
                    for x in output
                )
            for whole, x in zip(blocks[block], output, strict=True):
                if whole is not None and x is not None:
                    whole[start : start + len(x)] = x

        (prediction,) = replay.run(slice_rows(rows, start, batch_rows), on_output=keep)
        assert prediction is not None
        predictions.append(prediction)
    return blocks, torch.cat(predictions)


def _fit_layer(
    denoiser: Denoiser, layer: LayerPlan, statistics: InputStatistics, recipe: Recipe
) -> dict[str, Tensor]:
    """Return a layer's tensors for every candidate pair of widths, its branch and rotation given.

    With calibrate.inputs "quantized", a calibrated weight makes up for what its own activation
    quantizer does, so it is another one for every activation width. A search that measured one
    weight with all activations would find low activation bits dearer than they end up.
    """
    section = recipe.search
    few = statistics.thin(_TOKENS_PER_CHANNEL * layer.in_features, recipe.seed)
    weight, bias = arrays_of(linear_of(denoiser, layer))
    tokens = clean_tokens(layer, few)
    fitter = LayerFitter(layer, weight, bias, tokens, recipe.calibrate.without_training())
    tensors: dict[str, Tensor] = {}
    for activation_bits in sorted(set(section.activation_candidates)):
        met = fitter.meet(make_activation_format(section, activation_bits))
        for weight_bits in sorted(set(section.weight_candidates)):
            widened = layer.weight.model_copy(update={"bits": weight_bits})
            for name, value in fitter.fit(met, widened).tensors.items():
                own = "" if name.startswith(BRANCH) else pair_prefix(weight_bits, activation_bits)
                tensors[own + name] = torch.from_numpy(np.ascontiguousarray(value))
    return tensors
